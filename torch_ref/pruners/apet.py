"""ApET (arXiv:2602.19870): the tokens that a basis of distant ones approximates worst stay."""

from torch import Tensor

from .contract import Reduction, Signals, weighted_reduction
from .numerics import highest, nearest_mean


def prune(signals: Signals, K: int, *, basis: int = 10) -> Reduction:
    pairs = []
    for x_ND in signals.x_BND:
        kept = sorted(highest(approximation_errors(x_ND.double(), basis), K))
        pairs.append((kept, nearest_mean(x_ND, kept)))
    return weighted_reduction(signals, pairs)


def approximation_errors(x_ND: Tensor, basis: int) -> Tensor:
    """Distance of each token from the span of the basis, (N,): a share of the longest token's
    length, to nine digits."""
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
    return x_ND.norm(dim=-1).round(decimals=9)
