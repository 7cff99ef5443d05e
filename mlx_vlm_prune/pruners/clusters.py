"""Clusters by density peaks: centres are dense and far from anything denser.

Rodriguez and Laio, Science 2014; with density from the nearest neighbours (DPC-KNN) Du et al.,
2016. Called under `choosing()`.

Shapes: B images, n points, C centres, r rows of a block, m points from its first on, D features.
"""

import mlx.core as mx

from .contract import take
from .numerics import exp, keep_highest, rounded, to_choice_dtype

BLOCK = 2**24  # differences of coordinates that are held at once


def density_peaks(distance_Bnn: mx.array, C: int, neighbours: int = 5) -> mx.array:
    """The C points with the highest density times distance to a denser point, (B, C) ascending."""
    n = distance_Bnn.shape[1]
    near_Bnk = mx.sort(distance_Bnn, axis=-1)[..., 1 : min(neighbours, n - 1) + 1]
    density_Bn = exp(-mx.square(near_Bnk).mean(axis=-1)) if n > 1 else distance_Bnn[..., 0] * 0 + 1
    rank_Bn = mx.argsort(mx.argsort(-rounded(density_Bn), axis=-1), axis=-1)
    is_denser_Bnn = rank_Bn[:, None] < rank_Bn[..., None]
    reach_Bn = mx.where(is_denser_Bnn, distance_Bnn, mx.inf).min(axis=-1)
    reach_Bn = mx.where(rank_Bn == 0, distance_Bnn.max(axis=-1), reach_Bn)
    return keep_highest(rounded(density_Bn * reach_Bn), C)


def nearest_centres(distance_Bnn: mx.array, centre_BC: mx.array) -> mx.array:
    """The point that is each point's nearest centre, (B, n); a centre is its own."""
    home_Bn = take(centre_BC, mx.argmin(take(distance_Bnn, centre_BC, axis=2), axis=-1))
    return mx.put_along_axis(home_Bn, centre_BC, centre_BC, axis=1)


def distances(x_BnD: mx.array) -> mx.array:
    """Euclidean distances divided by the root of D, to nine digits, (B, n, n).

    From differences, a block of rows at a time: from squared lengths those of near-duplicates would
    be noise. A CPU computes a row at a time, which stays in its cache. Only distances to the
    row itself and those after it are computed.
    """
    x_BnD = to_choice_dtype(x_BnD)
    B, n, D = x_BnD.shape
    rows = 1 if x_BnD.dtype == mx.float64 else max(1, BLOCK // (B * n * D))
    parts, one_D1 = [], mx.ones((D, 1), dtype=x_BnD.dtype)
    for begin in range(0, n, rows):
        apart_BrmD = x_BnD[:, begin : begin + rows, None] - x_BnD[:, None, begin:]
        square_Brm = (mx.square(apart_BrmD) @ one_D1)[..., 0] / D  # faster than a mean
        parts.append(mx.pad(square_Brm, [(0, 0), (0, 0), (begin, 0)]))
    square_Bnn = mx.concatenate(parts, axis=1)
    return rounded(mx.sqrt(mx.maximum(square_Bnn, square_Bnn.swapaxes(1, 2))), 9)
