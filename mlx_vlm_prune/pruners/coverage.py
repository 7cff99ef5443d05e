"""Greedy coverage: columns that together cover all rows of a matrix.

A row is covered by its largest entry among the chosen columns. A column's gain is what it adds to
that, summed over the rows, times its saliency. Gains only shrink while columns are chosen, so an
earlier one is an upper bound: in float64, lazy evaluation (Minoux, 1978) makes the very same choice
from a few gains a step. It needs the host; elsewhere every step works out all gains.

Shapes: B images, M rows, N columns, n of them, K kept.
"""

import mlx.core as mx
import numpy as np

from .lazy import lazy_highest
from .numerics import fused, rounded
from .rows import Rows


def greedy_cover(columns: Rows, salient_BN: mx.array, K: int) -> mx.array:
    """The K columns, (B, K) ascending; of equal gains the first. A column is a row of `columns`."""
    is_on_host = salient_BN.dtype == mx.float64
    index_BK = (cover_lazily if is_on_host else cover)(columns, salient_BN, K)
    return mx.sort(index_BK, axis=1)


def cover(columns: Rows, salient_BN: mx.array, K: int) -> mx.array:
    """The columns in the order of choice, (B, K), by all gains in each step: one MLX graph."""
    age_BN, token_N = mx.zeros(salient_BN.shape, mx.int32), mx.arange(columns.N, dtype=mx.uint32)
    covered_BM, i_B1 = None, mx.full((len(salient_BN), 1), columns.N, mx.uint32)  # no column yet
    for _ in range(K):
        gain_BN = all_gains(columns, covered_BM)
        score_BN, age_BN = scores(gain_BN, salient_BN, age_BN, i_B1, token_N)
        i_B1 = mx.argmax(score_BN, axis=-1, keepdims=True)
        covered_BM = cover_more(covered_BM, columns.take(i_B1))
    earlier_BK = mx.argsort(-age_BN, axis=-1)[:, : K - 1]  # the oldest first
    return mx.concatenate([earlier_BK, i_B1], axis=1)


@fused
def scores(
    gain_BN: mx.array, salient_BN: mx.array, age_BN: mx.array, i_B1: mx.array, token_N: mx.array
) -> tuple[mx.array, mx.array]:
    """Scores, -1 of chosen columns, and for how many steps each has been chosen; i is the last."""
    age_BN = mx.where(token_N == i_B1, 1, age_BN + (age_BN > 0))
    return mx.where(age_BN > 0, -1, gain_BN * salient_BN), age_BN


def cover_lazily(columns: Rows, salient_BN: mx.array, K: int) -> mx.array:
    """The same by lazy evaluation."""
    score_BN = np.array(all_gains(columns, None) * salient_BN)
    score_BN = np.fmax(score_BN, -np.inf)  # no gain times an infinite saliency is no number
    salient, image_B1 = np.array(salient_BN), np.arange(len(score_BN))[:, None]
    covered_BM, kept = None, []

    def scores_of(index_Bn: np.ndarray) -> np.ndarray:
        gain_Bn = np.array(gains(columns.take(mx.array(index_Bn)), covered_BM))
        return gain_Bn * salient[image_B1, index_Bn]

    for _ in range(K):
        i_B1 = lazy_highest(score_BN, 1, scores_of)
        score_BN[image_B1, i_B1] = -np.inf
        kept.append(i_B1)
        covered_BM = cover_more(covered_BM, columns.take(mx.array(i_B1)))
        mx.eval(covered_BM)
    return mx.array(np.concatenate(kept, axis=1))


def cover_more(covered_BM: mx.array | None, column_B1M: mx.array) -> mx.array:
    """What the chosen columns and one more cover of each row."""
    return mx.maximum(column_B1M[:, 0], 0 if covered_BM is None else covered_BM)


def gains(column_BnM: mx.array, covered_BM: mx.array | None) -> mx.array:
    """What each of some columns adds, (B, n)."""
    if covered_BM is not None:
        return rounded(uncovered(column_BnM, covered_BM[:, None]).sum(axis=-1))
    return rounded(mx.maximum(column_BnM, 0).sum(axis=-1))


@fused
def uncovered(column_BnM: mx.array, covered_B1M: mx.array) -> mx.array:
    return mx.maximum(column_BnM - covered_B1M, 0)


def all_gains(columns: Rows, covered_BM: mx.array | None) -> mx.array:
    """What each column adds, (B, N)."""
    return mx.concatenate([gains(block, covered_BM) for block in columns.blocks()], axis=1)
