"""HoloV (arXiv:2510.02912): every run of the raster gets its share of the budget."""

import math
from itertools import pairwise

from torch import Tensor

from .contract import Reduction, Signals, index_reduction
from .numerics import cosine, highest

needs = {"cls_attention": "layer"}


def prune(
    signals: Signals, K: int, *, regions: int = 16, beta: float = 0.09, layer: float = -1
) -> Reduction:
    index = []
    for x_ND, attention_N in zip(signals.x_BND, signals.cls_attention_BN, strict=True):
        areas = runs(len(x_ND), min(regions, len(x_ND)))
        scores = [region_score(x_ND[area], attention_N[area], beta) for area in areas]
        shares = [round(score / (sum(scores) + 1e-6), 6) for score in scores]
        seats = [math.floor(share * K) for share in shares]
        left = K - sum(seats)
        for a in sorted(range(len(areas)), key=lambda a: (-shares[a], a))[:left]:
            seats[a] += 1
        quotas = zip(areas, seats, strict=True)
        kept = [area[i] for area, n in quotas for i in highest(attention_N[area], n)]
        others = [i for i in highest(attention_N, len(x_ND)) if i not in set(kept)]
        index.append(sorted(kept + others[: K - len(kept)]))
    return index_reduction(signals, index)


def runs(N: int, count: int) -> list[list[int]]:
    """N tokens in so many runs; the first ones have one more where they are not all as long."""
    ends = [i * (N // count) + min(i, N % count) for i in range(count + 1)]
    return [list(range(begin, end)) for begin, end in pairwise(ends)]


def region_score(x_nD: Tensor, attention_n: Tensor, beta: float) -> float:
    """The mean attention, more where similarities vary."""
    similar_nn = cosine(x_nD).fill_diagonal_(0)
    others = max(len(x_nD) - 1, 1)
    mean_n1 = similar_nn.sum(dim=1, keepdim=True) / others
    varied = ((similar_nn - mean_n1).square().sum(dim=1) / others).mean().item()
    return 1e3 * attention_n.double().mean().item() * (1 + beta * varied / (varied + 1e-6))
