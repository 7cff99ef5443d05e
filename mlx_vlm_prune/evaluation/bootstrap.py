"""How sure a figure is: the paired bootstrap, over groups of questions that are judged together.

All methods are resampled with the same draws, so the difference of two resampled means is
the resampled difference. Percentile intervals (Efron and Tibshirani 1993, chapter 13);
their coverage is checked by simulation in the tests.

Shapes: G groups, M columns (one a method), R resamples.
"""

import numpy as np

RESAMPLES = 2000
BOUNDS = (0.025, 0.975)  # of a 95 % interval
FEWEST = 20  # groups; of fewer an interval says too much
HELD = 1 << 22  # counts in memory at once


def resampled(
    sum_GM: np.ndarray, size_G: np.ndarray, rng: np.random.Generator, resamples: int = RESAMPLES
) -> np.ndarray:
    """Means over groups drawn with replacement, (R, M): of sums of `size` terms a group."""
    G, means = len(size_G), []
    sum_GM, size_G = np.asarray(sum_GM, np.float64), np.asarray(size_G, np.float64)
    at_once = max(1, HELD // G)
    for begin in range(0, resamples, at_once):
        rows = min(at_once, resamples - begin)
        drawn_RG = rng.integers(G, size=(rows, G)) + G * np.arange(rows)[:, None]
        times_RG = np.bincount(drawn_RG.ravel(), minlength=rows * G).reshape(rows, G)
        times_RG = times_RG.astype(np.float64)
        means.append((times_RG @ sum_GM) / (times_RG @ size_G)[:, None])
    return np.concatenate(means)


def interval(apart: float, apart_R: np.ndarray, groups: int) -> list[float | None]:
    """A difference and its 95 % interval, from the resampled differences; of fewer groups than
    FEWEST, None for the interval's ends."""
    if groups < FEWEST:
        return [short(apart), None, None]
    low, high = np.quantile(apart_R, BOUNDS)
    return [short(x) for x in (apart, low, high)]


def short(value: float) -> float:
    """To four digits; no minus before nought."""
    return round(float(value), 4) + 0.0
