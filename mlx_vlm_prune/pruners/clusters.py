"""Clusters by density peaks: centres are dense and far from anything denser.

Rodriguez and Laio, Science 2014; with density from the nearest neighbours (DPC-KNN) Du et al.,
2016. Called under `choosing()`.

Shapes: B images, n points, C centres, r rows of a block, m points from its first on, t points of a
tile, D features.
"""

import mlx.core as mx
import numpy as np

from . import rows
from .contract import take
from .numerics import constant, keep_highest, rounded, to_choice_dtype
from .rows import Rows

BLOCK = 2**24  # differences of coordinates that are held at once
TILE = 64  # points whose differences to another are computed together, on a CPU


def density_peaks(distance_Bnn: mx.array, C: int) -> mx.array:
    """The C points with the highest density times distance to a denser point, (B, C) ascending.
    A point's density is exp(-mean of the squared distances to the C nearest, itself among them)."""
    near_BnC = mx.sort(mx.partition(distance_Bnn, C - 1, axis=-1)[..., :C], axis=-1)
    spread_Bn = rounded(mx.square(near_BnC).mean(axis=-1))
    rank_Bn = mx.argsort(mx.argsort(spread_Bn, axis=-1), axis=-1)
    is_denser_Bnn = rank_Bn[:, None] < rank_Bn[..., None]
    reach_Bn = mx.where(is_denser_Bnn, distance_Bnn, mx.inf).min(axis=-1)
    reach_Bn = mx.where(rank_Bn == 0, distance_Bnn.max(axis=-1), reach_Bn)
    return keep_highest(peak_scores(spread_Bn, reach_Bn), C)


def peak_scores(spread_Bn: mx.array, reach_Bn: mx.array) -> mx.array:
    """The log of density times reach: among points that are far apart all densities would be 0."""
    return rounded(mx.log(mx.maximum(reach_Bn, constant(1e-12))) - spread_Bn)


def nearest_centres(distance_Bnn: mx.array, centre_BC: mx.array) -> mx.array:
    """The point that is each point's nearest centre, (B, n); a centre is its own."""
    home_Bn = take(centre_BC, mx.argmin(take(distance_Bnn, centre_BC, axis=2), axis=-1))
    return mx.put_along_axis(home_Bn, centre_BC, centre_BC, axis=1)


def distances(x_BnD: mx.array) -> mx.array:
    """Euclidean distances divided by the root of D, to nine digits, (B, n, n).

    From differences: from squared lengths those of near-duplicates would be noise.
    """
    x_BnD = to_choice_dtype(x_BnD)
    if x_BnD.dtype == mx.float64:
        squares = [squares_in_tiles(x_nD) for x_nD in np.array(x_BnD)]
        square_Bnn = mx.array(np.stack(squares), mx.float64)
    else:
        square_Bnn = squares_in_blocks(x_BnD)
    square_Bnn = mx.maximum(square_Bnn, square_Bnn.swapaxes(1, 2))
    return rounded(mx.sqrt(square_Bnn / x_BnD.shape[-1]), 9)


def distance_rows(x_BnD: mx.array) -> Rows:
    """The rows of `distances(x_BnD)`, as they are needed."""
    x_BnD = to_choice_dtype(x_BnD)
    n, D = x_BnD.shape[1:]
    if n <= rows.MOST_HELD:
        return Rows(distances, x_BnD)
    all_BnD = np.array(x_BnD) if x_BnD.dtype == mx.float64 else x_BnD

    def rows_of(part_BmD: mx.array) -> mx.array:
        if isinstance(all_BnD, np.ndarray):
            pairs = zip(np.array(part_BmD), all_BnD, strict=True)
            square_Bmn = mx.array(np.stack([rows_in_tiles(*pair) for pair in pairs]), mx.float64)
        else:
            square_Bmn = rows_in_blocks(part_BmD, x_BnD)
        return rounded(mx.sqrt(square_Bmn / D), 9)

    return Rows(rows_of, x_BnD)


def rows_in_blocks(part_BmD: mx.array, x_BnD: mx.array) -> mx.array:
    """Squared distances of m points to all, (B, m, n), as one graph."""
    B, n, D = x_BnD.shape
    rows, parts = max(1, BLOCK // (B * n * D)), []
    one_D1 = mx.ones((D, 1), dtype=x_BnD.dtype)
    for begin in range(0, part_BmD.shape[1], rows):
        apart_BrnD = part_BmD[:, begin : begin + rows, None] - x_BnD[:, None]
        parts.append((mx.square(apart_BrnD) @ one_D1)[..., 0])  # faster than a sum
    return mx.concatenate(parts, axis=1)


def rows_in_tiles(part_mD: np.ndarray, x_nD: np.ndarray) -> np.ndarray:
    """The same of one image, (m, n), from points so few at a time that a cache holds them."""
    square_mn, apart_tD = np.empty((len(part_mD), len(x_nD))), np.empty_like(x_nD[:TILE])
    for begin in range(0, len(x_nD), TILE):
        x_tD = x_nD[begin : begin + TILE]
        for i, point in enumerate(part_mD):
            apart = np.subtract(x_tD, point, out=apart_tD[: len(x_tD)])
            np.einsum("td,td->t", apart, apart, out=square_mn[i, begin : begin + TILE])
    return square_mn


def squares_in_blocks(x_BnD: mx.array) -> mx.array:
    """Squared distances of each to itself and those after it, else 0, (B, n, n), as one graph."""
    B, n, D = x_BnD.shape
    rows, parts = max(1, BLOCK // (B * n * D)), []
    one_D1 = mx.ones((D, 1), dtype=x_BnD.dtype)
    for begin in range(0, n, rows):
        apart_BrmD = x_BnD[:, begin : begin + rows, None] - x_BnD[:, None, begin:]
        square_Brm = (mx.square(apart_BrmD) @ one_D1)[..., 0]  # faster than a sum
        parts.append(mx.pad(square_Brm, [(0, 0), (0, 0), (begin, 0)]))
    return mx.concatenate(parts, axis=1)


def squares_in_tiles(x_nD: np.ndarray) -> np.ndarray:
    """The same of one image, (n, n), from points so few at a time that a cache holds them."""
    n = len(x_nD)
    square_nn, apart_tD = np.zeros((n, n)), np.empty_like(x_nD[:TILE])
    for begin in range(0, n, TILE):
        x_tD = x_nD[begin : begin + TILE]
        for i in range(min(begin + TILE, n)):
            apart = np.subtract(x_tD, x_nD[i], out=apart_tD[: len(x_tD)])
            np.einsum("td,td->t", apart, apart, out=square_nn[i, begin : begin + TILE])
    return square_nn
