"""ApET (arXiv:2602.19870): what a basis of distant tokens explains worst stays."""

from torch import Tensor

from .contract import Reduction, Signals, weighted_reduction
from .numerics import highest, nearest_mean


def prune(signals: Signals, K: int, *, basis: int = 10) -> Reduction:
    kept = [
        sorted(highest(approximation_errors(x_ND.double(), basis), K)) for x_ND in signals.x_BND
    ]
    pairs = zip(signals.x_BND, kept, strict=True)
    return weighted_reduction(
        signals, [(index, nearest_mean(x_ND, index)) for x_ND, index in pairs]
    )


def approximation_errors(x_ND: Tensor, basis: int) -> Tensor:
    """Distance of each token from the span of the basis, of the longest token, nine digits."""
    length = x_ND.norm(dim=-1)
    x_ND = x_ND / length.max().clamp(min=1e-30)
    chosen = [int((length / length.max().clamp(min=1e-30)).round(decimals=12).argmax())]
    while len(chosen) < min(basis, len(x_ND)):
        distance = (x_ND[:, None] - x_ND[chosen]).square().sum(-1).round(decimals=12)
        chosen.append(int(distance.min(dim=1).values.argmax()))
    span: list[Tensor] = []
    for i in chosen:
        left = x_ND[i].clone()
        for direction in span:
            left = left - (left @ direction) * direction
        if left.norm() > 1e-9:
            span.append(left / left.norm())
    for direction in span:
        x_ND = x_ND - (x_ND @ direction)[:, None] * direction
    return x_ND.norm(dim=-1).round(decimals=9)
