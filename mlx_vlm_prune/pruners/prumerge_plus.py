"""PruMerge with samples from all over the image.

LLaVA-PruMerge+, Shang et al., ICCV 2025, arXiv:2403.15388. The tokens whose score (see
`prumerge`) is an outlier, above the third quartile by 1.5 times the quartiles' distance,
stay; the budget is filled with evenly spaced others; each takes up its neighbours.

Differs from the authors' code: exactly K stay (of more outliers than that the highest),
and there is no extra token, since the samples speak for the rest.

Shapes: B images, N tokens, K kept.
"""

import mlx.core as mx
import numpy as np

from .contract import Reduction, Signals, Stage
from .prumerge import absorbed

stage = Stage.FEATURES
needs = {"cls_query": "layer", "keys": "layer"}


def prune(signals: Signals, K: int, *, neighbours: int = 32, layer: float = -1) -> Reduction:
    """Keep outliers and samples, K together; `layer` is read by the host."""

    def choose(score_BN: mx.array) -> mx.array:
        return mx.array(np.stack([chosen(score_N, K) for score_N in np.array(score_BN)]))

    return absorbed(signals, K, neighbours, choose)


def chosen(score_N: np.ndarray, K: int) -> np.ndarray:
    """Outliers, then evenly spaced others, ascending."""
    low, high = np.quantile(score_N, [0.25, 0.75])
    order = np.argsort(-score_N, kind="stable")
    outliers = order[: min(K, int((score_N > high + 1.5 * (high - low)).sum()))]
    rest = np.setdiff1d(np.arange(len(score_N)), outliers)
    wanted = K - len(outliers)
    samples = rest[np.arange(wanted) * len(rest) // max(1, wanted)]
    return np.sort(np.concatenate([outliers, samples]))
