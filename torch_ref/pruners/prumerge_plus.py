"""LLaVA-PruMerge+ (arXiv:2403.15388): outliers of CLS attention, filled up with even samples."""

import torch
from torch import Tensor

from .contract import Reduction, Signals, highest
from .prumerge import absorbed

needs = {"cls_query": "layer", "keys": "layer"}


def prune(signals: Signals, K: int, *, neighbours: int = 32, layer: float = -1) -> Reduction:
    return absorbed(signals, K, neighbours, lambda score_N: sampled(score_N, K))


def sampled(score_N: Tensor, K: int) -> list[int]:
    quarter, three = score_N.quantile(torch.tensor([0.25, 0.75], dtype=torch.float64)).tolist()
    high = (score_N > three + 1.5 * (three - quarter)).sum().item()
    kept = highest(score_N, min(K, int(high)))
    rest = [i for i in range(len(score_N)) if i not in set(kept)]
    missing = K - len(kept)
    return kept + [rest[i * len(rest) // missing] for i in range(missing)]
