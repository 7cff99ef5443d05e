"""Greedy coverage: columns that together cover all rows of a matrix.

A row is covered by its largest entry among the chosen columns. A column's gain is what it adds to
that, summed over the rows, times its saliency. Gains only shrink while columns are chosen, so an
earlier one is an upper bound: in float64, lazy evaluation (Minoux, 1978) makes the very same choice
from a few gains a step. It needs the host; elsewhere every step works out all gains.

Shapes: B images, M rows, N columns, n of them, K kept.
"""

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from .lazy import AHEAD, HeldRows, highest, lazy_highest
from .numerics import fused, rounded
from .rows import Rows

DIGITS = 10  # of a gain after the point: it sums entries of twelve


def greedy_cover(
    columns_of: Callable[..., Rows | HeldRows], salient_BN: mx.array, K: int, *parts_BN: mx.array
) -> mx.array:
    """The K columns, (B, K) ascending; of equal gains the first. A column is a row of
    `columns_of(*parts_BN)`."""
    if salient_BN.dtype != mx.float64:
        columns = columns_of(*parts_BN)
        assert isinstance(columns, Rows)
        return mx.sort(cover(columns, salient_BN, K), axis=1)
    kept = []
    for b in range(len(salient_BN)):
        columns = columns_of(*(part_BN[b : b + 1] for part_BN in parts_BN))
        assert isinstance(columns, HeldRows)
        kept.append(cover_lazily(columns, np.array(salient_BN[b]), K))
    return mx.sort(mx.array(np.array(kept)), axis=1)


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


def cover_lazily(columns: HeldRows, salient_N: np.ndarray, K: int) -> list[int]:
    """The same of one image by lazy evaluation."""
    score_N = np.array(all_gains(columns, None)[0]) * salient_N
    score_N = np.fmax(score_N, -np.inf)  # no gain times an infinite saliency is no number
    covered_M, kept = np.zeros(1), []

    def likely() -> np.ndarray:
        return highest(score_N, min(AHEAD, columns.N))

    def scores_of(index_n: np.ndarray) -> np.ndarray:
        more_nM = columns.take(index_n, likely)
        np.maximum(np.subtract(more_nM, covered_M, out=more_nM), 0, out=more_nM)
        gain_n = np.rint(more_nM.sum(axis=-1) * 10**DIGITS) / 10**DIGITS  # as in `gains`
        scores_n: np.ndarray = gain_n * salient_N[index_n]
        return scores_n

    for _ in range(K):
        i_1 = lazy_highest(score_N, 1, scores_of)
        score_N[i_1] = -np.inf
        kept.append(int(i_1[0]))
        covered_M = np.maximum(columns.take(i_1, likely)[0], covered_M)
    return kept


def cover_more(covered_BM: mx.array | None, column_B1M: mx.array) -> mx.array:
    """What the chosen columns and one more cover of each row."""
    return mx.maximum(column_B1M[:, 0], 0 if covered_BM is None else covered_BM)


def gains(column_BnM: mx.array, covered_BM: mx.array | None) -> mx.array:
    """What each of some columns adds, (B, n)."""
    if covered_BM is not None:
        return rounded(uncovered(column_BnM, covered_BM[:, None]).sum(axis=-1), DIGITS)
    return rounded(mx.maximum(column_BnM, 0).sum(axis=-1), DIGITS)


@fused
def uncovered(column_BnM: mx.array, covered_B1M: mx.array) -> mx.array:
    return mx.maximum(column_BnM - covered_B1M, 0)


def all_gains(columns: Rows | HeldRows, covered_BM: mx.array | None) -> mx.array:
    """What each column adds, (B, N)."""
    return columns.summed_up(lambda column_BnM: gains(column_BnM, covered_BM))
