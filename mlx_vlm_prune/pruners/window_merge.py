"""Merge the windows of neighbouring patches that are most alike, after the tower's first layer.

The first stage of MustDrop, Liu et al., arXiv:2411.10803. The image is divided into windows of
3 x 3 patches, fewer at its right and lower edge. A window's likeness is the mean cosine of every
two of its patches behind the first layer; those most alike become their mean until K tokens are
left. Of the last, as many of its first patches merge as that takes. Below one token a window,
windows are as much larger as that takes. The other layers see fewer tokens.

As the authors' code (github.com/liuting20/MustDrop@909afa5). Differs: K decides how many windows
merge, theirs those of a likeness of 0.8, in a batch as many of each image as of the one with the
fewest; a mean stands at the middle of its window, theirs ahead of all single patches; any grid.

Options:
    side: rows and columns of a window

Shapes: B images, N tokens, K left, W windows, M members of one, D features.
"""

from functools import lru_cache

import mlx.core as mx
import numpy as np

from .contract import Reduction, Signals, Stage, segment_sum, take
from .numerics import choosing, keep_marked, rounded, unit

stage = Stage.ENCODER
needs: dict[str, str | None] = {"grid": None}


def cuts(layers: int, N: int, K: int) -> list[tuple[int, str, int]]:
    """Once, behind the first layer; of a single layer before its MLP."""
    return [(1, "before", K) if layers > 1 else (0, "middle", K)]


def prune(signals: Signals, K: int, *, side: int = 3) -> Reduction:
    """Merge to K tokens."""
    if side < 2:
        raise ValueError(f"side is {side}; a window has 2 rows and columns at least")
    window_N, rank_N, member_WM, count_W = (
        mx.array(table) for table in windows(signals.grid, window_side(signals.grid, K, side))
    )
    N = signals.x_BND.shape[1]
    with choosing():
        merging_BW = merging(likeness(unit(signals.x_BND), window_N, count_W), count_W - 1, N - K)
        last_BN, middle_BN = merging_BW[:, window_N], ((merging_BW + 1) // 2)[:, window_N]
        is_slot_BN = (rank_N > last_BN) | (rank_N == middle_BN)
        middle_token_BN = member_WM[window_N, middle_BN]
        home_BN = mx.where(rank_N > last_BN, mx.arange(N, dtype=mx.int32), middle_token_BN)
        slot_BN = take(mx.cumsum(is_slot_BN.astype(mx.int32), axis=1) - 1, home_BN)
        return Reduction.merge(keep_marked(is_slot_BN, K), slot_BN)


def window_side(grid: tuple[int, int], K: int, side: int) -> int:
    """The smallest side from this one on with at most K windows."""
    while -(-grid[0] // side) * -(-grid[1] // side) > K:
        side += 1
    return side


@lru_cache(maxsize=64)
def windows(grid: tuple[int, int], side: int) -> tuple[np.ndarray, ...]:
    """Of each token its window and its place in it (N,); of each window its members (W, M), filled
    up with the last, and their number (W,)."""
    (rows, columns), across = grid, -(-grid[1] // side)
    row_N, column_N = np.divmod(np.arange(rows * columns), columns)
    window_N = row_N // side * across + column_N // side
    members = [np.flatnonzero(window_N == w) for w in range(window_N.max() + 1)]
    rank_N = np.zeros_like(window_N)
    for tokens in members:
        rank_N[tokens] = np.arange(len(tokens))
    most = max(map(len, members))
    member_WM = np.stack([np.pad(tokens, (0, most - len(tokens)), "edge") for tokens in members])
    tables = window_N, rank_N, member_WM, np.array([*map(len, members)])
    return tuple(table.astype(np.int32) for table in tables)


def likeness(unit_BND: mx.array, window_N: mx.array, count_W: mx.array) -> mx.array:
    """The mean cosine of every two members of each window, (B, W); -1 of a single one."""
    window_BN = mx.broadcast_to(window_N, unit_BND.shape[:2])
    sum_BWD = segment_sum(unit_BND, window_BN, len(count_W))
    square_BN1 = mx.square(unit_BND).sum(axis=-1, keepdims=True)
    pairs_BW = mx.square(sum_BWD).sum(axis=-1)
    pairs_BW = pairs_BW - segment_sum(square_BN1, window_BN, len(count_W))[..., 0]
    mean_BW = pairs_BW / mx.maximum(count_W * (count_W - 1), 1)
    return rounded(mx.where(count_W > 1, mean_BW, -1))


def merging(likeness_BW: mx.array, most_W: mx.array, leaving: int) -> mx.array:
    """How many tokens leave each window, the most alike first, (B, W); `most_W` can."""
    order_BW = mx.argsort(-likeness_BW, axis=-1)  # stable
    most_BW = most_W[order_BW]
    before_BW = mx.cumsum(most_BW, axis=1) - most_BW
    leaving_BW = mx.clip(leaving - before_BW, 0, most_BW)
    return mx.put_along_axis(mx.zeros_like(leaving_BW), order_BW, leaving_BW, axis=1)
