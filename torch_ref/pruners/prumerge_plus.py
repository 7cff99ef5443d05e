"""LLaVA-PruMerge+ (arXiv:2403.15388): outliers of CLS attention, filled up with even samples."""

import torch
from torch import Tensor

from .contract import Reduction, Signals, weighted_reduction
from .numerics import highest
from .prumerge import cls_scores, with_neighbours

needs = {"cls_query": "layer", "keys": "layer"}


def prune(signals: Signals, K: int, *, neighbours: int = 32, layer: float = -1) -> Reduction:
    pairs = []
    for query_Hd, keys_NHd in zip(signals.cls_query_BHd, signals.keys_BNHd, strict=True):
        score_N = cls_scores(query_Hd, keys_NHd)
        kept = outliers_and_samples(score_N, K)
        rows = with_neighbours(score_N, keys_NHd, kept, neighbours)
        pairs.append((kept, torch.stack([rows[i] for i in kept])))
    return weighted_reduction(signals, pairs)


def outliers_and_samples(score_N: Tensor, K: int) -> list[int]:
    """K tokens, ascending."""
    quarters = torch.tensor([0.25, 0.75], dtype=torch.float64)
    low, high = score_N.quantile(quarters).tolist()
    outliers = int((score_N > high + 1.5 * (high - low)).sum())
    kept = highest(score_N, min(K, outliers))
    others = [i for i in range(len(score_N)) if i not in set(kept)]
    count = K - len(kept)
    return sorted(kept + [others[i * len(others) // count] for i in range(count)])
