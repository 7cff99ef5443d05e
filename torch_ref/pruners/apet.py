"""ApET (arXiv:2602.19870): the tokens that a basis of distant ones approximates worst stay.

The basis takes the places of the last of them.
"""

import torch
from torch import Tensor

from .contract import Reduction, Signals, weighted_reduction
from .numerics import highest, nearest_slots


def prune(signals: Signals, K: int, *, basis: int = 10) -> Reduction:
    pairs = []
    for x_ND in signals.x_BND:
        error_N, chosen = approximation_errors(x_ND.double(), basis)
        order, M = highest(error_N, K), min(len(chosen), K - 1)
        merged, replaced = order[: K - M], sorted(order[K - M :])
        slots = nearest_slots(x_ND, merged)
        weight_NN = torch.zeros(len(x_ND), len(x_ND))
        for i, slot in enumerate(slots):
            if i not in replaced:
                weight_NN[merged[slot], i] = 1
        weight_NN[replaced, chosen[:M]] = 1
        kept = sorted(order)
        weight_KN = weight_NN[kept]
        pairs.append((kept, weight_KN / weight_KN.sum(dim=1, keepdim=True)))
    return weighted_reduction(signals, pairs)


def approximation_errors(x_ND: Tensor, basis: int) -> tuple[Tensor, list[int]]:
    """Distance of each token from the span of the basis, (N,): a share of the longest token's
    length, to nine digits; and the basis tokens in the order in which they were sampled."""
    length = x_ND.norm(dim=-1)
    x_ND = x_ND / length.max().clamp(min=1e-30)
    chosen = [int((length / length.max().clamp(min=1e-30)).round(decimals=12).argmax())]
    while len(chosen) < min(basis, len(x_ND)):
        distance = (x_ND[:, None] - x_ND[chosen]).square().sum(-1).round(decimals=12)
        chosen.append(int(distance.min(dim=1).values.argmax()))
    span: list[Tensor] = []
    for i in chosen:
        residual_D = x_ND[i].clone()
        for direction_D in span:
            residual_D = residual_D - (residual_D @ direction_D) * direction_D
        if residual_D.norm() > 1e-9:
            span.append(residual_D / residual_D.norm())
    for direction_D in span:
        x_ND = x_ND - (x_ND @ direction_D)[:, None] * direction_D
    return x_ND.norm(dim=-1).round(decimals=9), chosen
