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

from .contract import Reduction, Signals, Stage, take
from .numerics import choosing
from .prumerge import cls_scores, with_neighbours

stage = Stage.FEATURES
needs = {"cls_query": "layer", "keys": "layer"}


def prune(signals: Signals, K: int, *, neighbours: int = 32, layer: float = -1) -> Reduction:
    """Keep outliers and samples, K together; `layer` is read by the host."""
    with choosing():
        score_BN = cls_scores(signals)
        index_BK = outliers_and_samples(score_BN, K)
        return Reduction(index_BK, with_neighbours(signals, score_BN, index_BK, neighbours))


def outliers_and_samples(score_BN: mx.array, K: int) -> mx.array:
    """Outliers, at most K, and evenly spaced others, (B, K) ascending."""
    low_B1, high_B1 = quantile(score_BN, 0.25), quantile(score_BN, 0.75)
    is_outlier_BN = score_BN > high_B1 + 1.5 * (high_B1 - low_B1)
    outliers_B1 = mx.minimum(is_outlier_BN.sum(axis=-1, keepdims=True).astype(mx.int32), K)
    order_BN = mx.argsort(-score_BN, axis=-1)
    rank_BN = mx.argsort(order_BN, axis=-1)
    others_BN = mx.argsort(rank_BN < outliers_B1, axis=-1)  # before the outliers
    count_B1, slot_K = K - outliers_B1, mx.arange(K)
    spaced_BK = slot_K * (score_BN.shape[1] - outliers_B1) // mx.maximum(count_B1, 1)
    is_sample_BK = slot_K < count_B1
    sample_BK = take(others_BN, mx.where(is_sample_BK, spaced_BK, 0))
    outlier_BK = take(order_BN, mx.maximum(slot_K - count_B1, 0))
    return mx.sort(mx.where(is_sample_BK, sample_BK, outlier_BK), axis=1)


def quantile(score_BN: mx.array, share: float) -> mx.array:
    """Between the two scores around a share of the sorted ones, (B, 1), as numpy has it."""
    last = score_BN.shape[1] - 1
    below, part = int(share * last), share * last % 1  # a multiple of a quarter
    sorted_BN = mx.sort(score_BN, axis=-1)
    low_B1, high_B1 = sorted_BN[:, below, None], sorted_BN[:, min(below + 1, last), None]
    return low_B1 + part * (high_B1 - low_B1)
