"""Confidence intervals by the paired bootstrap, over groups of questions scored together.

All methods are resampled with the same draws, so the difference of two resampled means is
the resampled difference. Percentile intervals (Efron and Tibshirani 1993, chapter 13);
their coverage is checked by simulation in the tests. Of fewer than FEWEST groups they would be too
narrow.

Shapes: G groups, M columns (one a method), R resamples.
"""

import numpy as np

from ..machine.remembered import FEWEST

RESAMPLES = 2000
BOUNDS = (0.025, 0.975)  # of a 95 % interval
MOST_COUNTS = 1 << 22  # in memory at once


def resampled(
    sum_GM: np.ndarray, size_G: np.ndarray, rng: np.random.Generator, resamples: int = RESAMPLES
) -> np.ndarray:
    """Means over groups drawn with replacement, (R, M). `sum_GM` are the sums of `size_G` terms."""
    G, means = len(size_G), []
    sum_GM, size_G = np.asarray(sum_GM, np.float64), np.asarray(size_G, np.float64)
    at_once = max(1, MOST_COUNTS // G)
    for begin in range(0, resamples, at_once):
        R = min(at_once, resamples - begin)
        drawn_RG = rng.integers(G, size=(R, G)) + G * np.arange(R)[:, None]
        count_RG = np.bincount(drawn_RG.ravel(), minlength=R * G).reshape(R, G)
        count_RG = count_RG.astype(np.float64)
        means.append((count_RG @ sum_GM) / (count_RG @ size_G)[:, None])
    return np.concatenate(means)


def interval(difference: float, difference_R: np.ndarray, groups: int) -> list[float | None]:
    """A difference, and the lower and upper end of its 95 % interval from resampled differences.

    The ends are None for fewer than FEWEST groups.
    """
    if groups < FEWEST:
        return [short(difference), None, None]
    low, high = np.quantile(difference_R, BOUNDS)
    return [short(x) for x in (difference, low, high)]


def short(value: float) -> float:
    """Rounded to four digits, without negative zero."""
    return round(float(value), 4) + 0.0
