"""PruMerge with samples from all over the image.

LLaVA-PruMerge+, Shang et al., ICCV 2025, arXiv:2403.15388. The tokens whose score (see
`prumerge`) is an outlier, above the third quartile by 1.5 times the quartiles' distance,
stay; the budget is filled with evenly spaced others; each adds its neighbours.

Differs from the authors' code: exactly K stay (of more outliers than that the highest),
and there is no extra slot, since the samples stand for the rest.

Options:
    neighbours: how many similar tokens each kept one adds, 0 or more
    layer: number of the tower's layer that is read; -1 is the last

Shapes: B images, N tokens, K kept.
"""

import mlx.core as mx
import numpy as np

from .contract import Reduction, Signals, Stage
from .numerics import choosing
from .prumerge import cls_scores, with_neighbours

stage = Stage.FEATURES
needs = {"cls_query": "layer", "keys": "layer"}


def prune(signals: Signals, K: int, *, neighbours: int = 32, layer: float = -1) -> Reduction:
    """Keep outliers and samples, K together; `layer` is read by the host."""
    with choosing():
        score_BN = cls_scores(signals)
        kept = [outliers_and_samples(score_N, K) for score_N in np.array(score_BN)]
        index_BK = mx.array(np.stack(kept))
        return Reduction(index_BK, with_neighbours(signals, score_BN, index_BK, neighbours))


def outliers_and_samples(score_N: np.ndarray, K: int) -> np.ndarray:
    """Outliers, then evenly spaced others, (K,) ascending."""
    low, high = np.quantile(score_N, [0.25, 0.75])
    order = np.argsort(-score_N, kind="stable")
    outliers = order[: min(K, int((score_N > high + 1.5 * (high - low)).sum()))]
    others = np.setdiff1d(np.arange(len(score_N)), outliers)
    count = K - len(outliers)
    samples = others[np.arange(count) * len(others) // max(1, count)]
    return np.sort(np.concatenate([outliers, samples]))
