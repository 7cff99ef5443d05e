"""LLaVA-PruMerge+ (arXiv:2403.15388): outliers of CLS attention, filled up with even samples."""

import torch
from torch import Tensor

from .contract import Reduction, Signals, weighted_reduction
from .numerics import highest
from .prumerge import cls_scores, with_sum_of_rest

needs = {"cls_query": "layer", "cls_key": "layer", "keys": "layer"}


def prune(
    signals: Signals, K: int, *, neighbours: int = 32, layer: float = -1, behind: bool = True
) -> Reduction:
    pairs = []
    for b, keys_NHd in enumerate(signals.keys_BNHd):
        score_N = cls_scores(signals, b)
        kept = outliers_and_samples(score_N, max(1, K - 1))
        pairs.append(with_sum_of_rest(score_N, keys_NHd, kept, K, neighbours))
    return weighted_reduction(signals, pairs)


def outliers_and_samples(score_N: Tensor, K: int) -> list[int]:
    """K tokens, ascending: outliers, then every s-th token, then others."""
    N, quarters = len(score_N), torch.tensor([0.25, 0.75], dtype=torch.float64)
    low, high = score_N.quantile(quarters).tolist()
    outliers = int((score_N > high + 1.5 * (high - low)).sum())
    kept = highest(score_N, min(K, outliers))
    step = max(1, N // max(1, outliers) // 3)
    samples = [i for i in range(0, N - 1, step) if i not in kept]
    others = [i for i in range(N) if i not in {*kept, *samples}]
    count = K - len(kept)
    first = samples if count > len(samples) else evenly(samples, count)
    return sorted(kept + first + evenly(others, count - len(first)))


def evenly(tokens: list[int], count: int) -> list[int]:
    """So many of them, evenly spaced."""
    return [tokens[i * len(tokens) // count] for i in range(count)]
