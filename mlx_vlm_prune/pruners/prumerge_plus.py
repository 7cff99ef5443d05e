"""PruMerge with samples from all over the image.

LLaVA-PruMerge+, Shang et al., ICCV 2025, arXiv:2403.15388. The tokens whose score (see
`prumerge`) is an outlier, above the third quartile by 1.5 times the quartiles' distance,
stay, and every s-th of the others, where of N tokens N / (3 s) are outliers; each adds its
neighbours; one more slot is the sum of the rest.

As the authors' code (github.com/42Shawn/LLaVA-PruMerge@097c041) for the K that it comes to.
Differs: exactly K stay, since a budget is one number here: of more outliers the highest, of more
samples some in even steps, and where both are fewer, others in even steps; layer and places as
`prumerge` has them.

Options:
    neighbours: how many similar tokens each kept one adds, 0 or more
    layer: number of the tower's layer that is read; -1 is the one whose output the features are
    behind: read the layer behind that one

Shapes: B images, N tokens, K kept.
"""

import mlx.core as mx

from .contract import Reduction, Signals, Stage, take
from .numerics import choosing
from .prumerge import cls_scores, with_sum_of_rest

stage = Stage.FEATURES
needs = {"cls_query": "layer", "cls_key": "layer", "keys": "layer"}


def prune(
    signals: Signals, K: int, *, neighbours: int = 32, layer: float = -1, behind: bool = True
) -> Reduction:
    """Keep outliers and samples, K - 1 together, and a sum of the rest; `layer` and
    `behind` are read by the host."""
    with choosing():
        score_BN = cls_scores(signals)
        kept_BC = outliers_and_samples(score_BN, max(1, K - 1))
        return with_sum_of_rest(signals, score_BN, kept_BC, K, neighbours)


def outliers_and_samples(score_BN: mx.array, K: int) -> mx.array:
    """Outliers, at most K, and others: samples first, evenly spaced, (B, K) ascending."""
    low_B1, high_B1 = quantile(score_BN, 0.25), quantile(score_BN, 0.75)
    is_outlier_BN = score_BN > high_B1 + 1.5 * (high_B1 - low_B1)
    all_outliers_B1 = is_outlier_BN.sum(axis=-1, keepdims=True).astype(mx.int32)
    outliers_B1 = mx.minimum(all_outliers_B1, K)
    order_BN = mx.argsort(-score_BN, axis=-1)
    rank_BN = mx.argsort(order_BN, axis=-1)
    is_outlier_BN = rank_BN < outliers_B1
    is_sample_BN = ~is_outlier_BN & is_in_step(all_outliers_B1, score_BN.shape[1])
    samples_B1 = is_sample_BN.sum(axis=-1, keepdims=True).astype(mx.int32)
    others_BN = mx.argsort(2 * is_outlier_BN.astype(mx.int32) - is_sample_BN, axis=-1)
    count_B1, slot_K = K - outliers_B1, mx.arange(K)
    left_B1, more_B1 = score_BN.shape[1] - outliers_B1 - samples_B1, count_B1 - samples_B1
    among_samples_BK = slot_K * samples_B1 // mx.maximum(count_B1, 1)
    beyond_BK = samples_B1 + (slot_K - samples_B1) * left_B1 // mx.maximum(more_B1, 1)
    all_samples_BK = mx.where(slot_K < samples_B1, slot_K, beyond_BK)
    spaced_BK = mx.where(more_B1 > 0, all_samples_BK, among_samples_BK)
    is_sample_BK = slot_K < count_B1
    sample_BK = take(others_BN, mx.where(is_sample_BK, spaced_BK, 0))
    outlier_BK = take(order_BN, mx.maximum(slot_K - count_B1, 0))
    return mx.sort(mx.where(is_sample_BK, sample_BK, outlier_BK), axis=1)


def is_in_step(outliers_B1: mx.array, N: int) -> mx.array:
    """Which of N tokens, the last one never, are in steps of a third of N / outliers, (B, N)."""
    step_B1 = mx.maximum(N // mx.maximum(outliers_B1, 1) // 3, 1)
    token_N = mx.arange(N)
    return (token_N % step_B1 == 0) & (token_N < N - 1)


def quantile(score_BN: mx.array, share: float) -> mx.array:
    """Between the two scores around a share of the sorted ones, (B, 1), as numpy has it."""
    last = score_BN.shape[1] - 1
    below, part = int(share * last), share * last % 1  # a multiple of a quarter
    sorted_BN = mx.sort(score_BN, axis=-1)
    low_B1, high_B1 = sorted_BN[:, below, None], sorted_BN[:, min(below + 1, last), None]
    return low_B1 + part * (high_B1 - low_B1)
