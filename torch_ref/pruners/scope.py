"""SCOPE (arXiv:2510.24214): greedily what adds most coverage, times its CLS attention."""

import torch
from torch import Tensor

from .contract import Reduction, Signals, index_reduction
from .numerics import cosine

needs = {"cls_attention": "layer"}


def prune(signals: Signals, K: int, *, power: float = 1.0, layer: float = -1) -> Reduction:
    pairs = zip(signals.x_BND, signals.cls_attention_BN, strict=True)
    index = [greedy_cover(cosine(x), row.double() ** power, K) for x, row in pairs]
    return index_reduction(signals, index)


def greedy_cover(similar_MN: Tensor, salient_N: Tensor, K: int) -> list[int]:
    """K columns that greedily cover the M rows, each row by its largest entry among them."""
    covered_M1 = torch.zeros(len(similar_MN), 1, dtype=torch.float64)
    kept: list[int] = []
    for _ in range(K):
        gain = (similar_MN - covered_M1).clamp(min=0).sum(dim=0).round(decimals=10) * salient_N
        gain[kept] = -1
        kept.append(int(gain.argmax()))
        covered_M1 = torch.maximum(covered_M1, similar_MN[:, kept[-1:]])
    return sorted(kept)
