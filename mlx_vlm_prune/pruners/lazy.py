"""Lazy evaluation: the highest scores, without working out those that cannot be among them.

In numpy, on the host: what is worked out next depends on what came of the last.

Shapes: B images, N candidates, n of them, k highest.
"""

from collections.abc import Callable

import numpy as np

BATCH = 16  # scores that are worked out together, at least


def lazy_highest(
    bound_BN: np.ndarray, k: int, scores_of: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Indices (B, k) of the k highest scores, the highest first; ties go to the lower index.

    `scores_of(index_Bn)` works out the scores (B, n) of some candidates. None is above its bound;
    where it is, the bound counts, so that -inf rules a candidate out. Scores that were worked out
    take the place of their bounds.
    """
    (B, N), is_exact_BN = bound_BN.shape, np.zeros(bound_BN.shape, bool)
    n, image_B1 = min(max(k, BATCH), N), np.arange(B)[:, None]
    while True:
        index_Bn = np.stack([highest(bound_N, n) for bound_N in bound_BN])
        if is_exact_BN[image_B1, index_Bn[:, :k]].all():
            return index_Bn[:, :k]
        bound_BN[image_B1, index_Bn] = np.fmin(scores_of(index_Bn), bound_BN[image_B1, index_Bn])
        is_exact_BN[image_B1, index_Bn] = True


def highest(score_N: np.ndarray, k: int) -> np.ndarray:
    """Indices (k,) of the k highest scores, the highest first; ties go to the lower index."""
    lowest_of_k = np.partition(score_N, len(score_N) - k)[len(score_N) - k]
    candidates = np.flatnonzero(score_N >= lowest_of_k)
    return candidates[np.argsort(-score_N[candidates], kind="stable")[:k]]
