"""SCoRe (CVPR 2026): greedily what is farthest from all kept, times the attention it receives."""

import torch
from torch import Tensor

from .contract import Reduction, Signals, index_reduction
from .numerics import cosine

needs = {"received_attention": "layer"}


def prune(signals: Signals, K: int, *, power: float = 0.8, layer: float = -1) -> Reduction:
    pairs = zip(signals.x_BND, signals.received_attention_BN, strict=True)
    chosen = [cover(1 - cosine(x), a_N.double() ** power, K) for x, a_N in pairs]
    return index_reduction(signals, chosen)


def cover(distance_NN: Tensor, support_N: Tensor, K: int) -> list[int]:
    """The most supported token, then those with the highest distance times support."""
    kept = [int(support_N.argmax())]
    while len(kept) < K:
        score_N = distance_NN[:, kept].min(dim=1).values.clamp(min=0) * support_N
        score_N[kept] = -torch.inf
        kept.append(int(score_N.argmax()))
    return sorted(kept)
