"""Lazy evaluation: the highest scores, without working out those that cannot be among them.

In numpy, on the host, one image at a time: what is worked out next depends on the results so far.

Shapes: N candidates, n of them, k highest, M entries of a row, h rows held.
"""

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from .contract import take
from .numerics import choice_dtype
from .rows import Rows

BATCH = 16  # scores that are worked out together, at least
MOST_BYTES = 15 * 2**24  # of the rows that are held
AHEAD = 128  # rows that are computed together, at most


def lazy_highest(
    bound_N: np.ndarray, k: int, scores_of: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Indices (k,) of the k highest scores, the highest first; ties go to the lower index.

    `scores_of(index_n)` works out the scores (n,) of some candidates. None is above its bound;
    where it is, the bound counts, so that -inf rules a candidate out. Scores that were worked out
    take the place of their bounds.
    """
    N, is_exact_N = len(bound_N), np.zeros(len(bound_N), bool)
    n = min(max(k, BATCH), N)
    while True:
        index_n = highest(bound_N, n)
        if is_exact_N[index_n[:k]].all():
            return index_n[:k]
        index_n = index_n[~is_exact_N[index_n]]
        bound_N[index_n] = np.fmin(scores_of(index_n), bound_N[index_n])
        is_exact_N[index_n] = True


def highest(score_N: np.ndarray, k: int) -> np.ndarray:
    """Indices (k,) of the k highest scores, the highest first; ties go to the lower index."""
    lowest_of_k = np.partition(score_N, len(score_N) - k)[len(score_N) - k]
    candidates = np.flatnonzero(score_N >= lowest_of_k)
    return candidates[np.argsort(-score_N[candidates], kind="stable")[:k]]


class HeldRows:
    """Rows of one image on the host, computed when they are first read. They are held; of more than
    `MOST_BYTES`, those that were read last."""

    def __init__(self, rows: Rows) -> None:
        self.rows, self.N = rows, rows.N
        self.held_hM = np.empty((0, 0))
        self.place_N = np.full(self.N, -1)  # of a token's row; -1: it is not held
        self.token_h, self.read_h = np.empty((2, 0), int)  # whose each is; when it was last read
        self.reads = 1

    def take(self, index_n: np.ndarray, likely: Callable[[], np.ndarray]) -> np.ndarray:
        """The rows of some tokens, (n, M). Where one is missing, `likely()` says which others will
        be read soon, at most `AHEAD`: they are computed together with it."""
        self.reads += 1
        if (self.place_N[index_n] < 0).any():
            index_m = np.union1d(index_n, likely())
            index_m = index_m[self.place_N[index_m] < 0]
            self.hold(index_m, self.compute(index_m), index_n)
        place_n = self.place_N[index_n]
        self.read_h[place_n] = self.reads
        return self.held_hM[place_n]

    def compute(self, index_n: np.ndarray) -> np.ndarray:
        """Rows (n, M), none of them held."""
        row_nM: np.ndarray = np.array(self.rows.take(mx.array(index_n[None]))[0])
        if not self.held_hM.size:
            M = row_nM.shape[1]
            most = min(self.N, max(MOST_BYTES // (8 * M), AHEAD + 2 * BATCH))
            self.held_hM = np.empty((most, M))  # takes memory when it is written
            self.token_h, self.read_h = np.full(most, -1), np.zeros(most, int)
        return row_nM

    def hold(self, index_n: np.ndarray, row_nM: np.ndarray, needed_n: np.ndarray) -> None:
        """Hold rows in the place of those read longest ago, but of none that is needed now."""
        needed_n = self.place_N[needed_n]
        self.read_h[needed_n[needed_n >= 0]] = self.reads
        place_n = np.argsort(self.read_h, kind="stable")[: len(index_n)]
        before_n = self.token_h[place_n]
        self.place_N[before_n[before_n >= 0]] = -1
        self.held_hM[place_n], self.token_h[place_n] = row_nM, index_n
        self.place_N[index_n], self.read_h[place_n] = place_n, self.reads

    def summed_up(self, summary: Callable[[mx.array], mx.array]) -> mx.array:
        """`summary(rows)`, (1, n), of all rows in order, (1, N). The first rows, as many as there
        is room for, are held."""
        summaries = []
        for first in range(0, self.N, AHEAD):
            index_n = np.arange(first, min(first + AHEAD, self.N))
            place_n = self.place_N[index_n]
            if (place_n >= 0).all():
                row_nM = self.held_hM[place_n]
            else:
                row_nM = self.compute(index_n)
                if (place_n < 0).all() and (self.token_h < 0).sum() >= len(index_n):
                    self.hold(index_n, row_nM, index_n)
            summaries.append(summary(mx.array(row_nM[None], mx.float64)))
            mx.eval(summaries[-1])
        return mx.concatenate(summaries, axis=1)

    def then(self, change: Callable[..., mx.array], *parts_1N: mx.array) -> "HeldRows":
        """The rows `change(rows, *parts)`, as wide, with further parts of each token; in place of
        these."""
        self.rows = self.rows.then(change, *parts_1N)
        index_m = np.flatnonzero(self.place_N >= 0)
        for first in range(0, len(index_m), AHEAD):
            index_n = index_m[first : first + AHEAD]
            place_n, index_1n = self.place_N[index_n], mx.array(index_n[None])
            row_1nM = mx.array(self.held_hM[place_n][None], mx.float64)
            parts_1n = [take(part_1N, index_1n) for part_1N in parts_1N]
            self.held_hM[place_n] = np.array(change(row_1nM, *parts_1n)[0])
        return self


def read_lazily(rows: Rows) -> Rows | HeldRows:
    """Rows of which a choice reads some: in float64 of one image, and held on the host."""
    return HeldRows(rows) if choice_dtype() == mx.float64 else rows
