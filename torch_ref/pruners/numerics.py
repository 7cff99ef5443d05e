"""What methods choose by, in float64: the K highest scores, similarities, means.

Shapes: B images, N tokens, M others, D features, K kept.
"""

import torch
from torch import Tensor

DROPPED = 1e-20  # the factor of a dropped token: it gets no attention, but a gradient
STEEPEST = 1e12  # of such a gradient: squares of what may come of a larger one are infinite


def keep_highest(score_BN: Tensor, K: int) -> Tensor:
    """Indices (B, K), ascending, of the K highest scores; ties go to the lower index."""
    order_BN = score_BN.argsort(dim=-1, descending=True, stable=True)
    return order_BN[:, :K].sort(dim=-1).values


def straight_through(score_BN: Tensor, K: int, noise: float) -> Tensor:
    """A factor (B, N) on the attention that tokens get, while their scores are trained.

    1 for the K highest of the scores plus Gumbel noise, next to 0 for the others; its gradient is
    that of a sigmoid of the distance from the K-th.
    """
    gumbel_BN = -torch.empty_like(score_BN).exponential_().log()
    noisy_BN = score_BN + noise * gumbel_BN
    line_B1 = noisy_BN.detach().topk(K).values[:, -1:]
    soft_BN = torch.sigmoid(noisy_BN - line_B1)
    hard_BN = (noisy_BN >= line_B1).float().clamp(min=DROPPED)
    factor_BN = hard_BN + (soft_BN - soft_BN.detach())
    if factor_BN.requires_grad:
        factor_BN.register_hook(lambda gradient_BN: gradient_BN.clamp(-STEEPEST, STEEPEST))
    return factor_BN


def budget_in_turn(K: int, step: int) -> int:
    """Half of K, K and twice K in turn: scores then rank tokens for other budgets, too."""
    return max(1, K * 2 ** (step % 3) // 2)


def highest(score_N: Tensor, K: int) -> list[int]:
    """The same for one image, the highest first."""
    return score_N.argsort(descending=True, stable=True)[:K].tolist()


def cosine(x_ND: Tensor, y_MD: Tensor | None = None) -> Tensor:
    """Cosine similarity of every two tokens, (N, M), float64, to twelve digits."""
    x_ND = x_ND.double()
    y_MD = x_ND if y_MD is None else y_MD.double()
    x_ND, y_MD = (v / v.norm(dim=-1, keepdim=True).clamp(min=1e-6) for v in (x_ND, y_MD))
    return (x_ND @ y_MD.T).round(decimals=12)


def scale_to_unit(score_N: Tensor) -> Tensor:
    """Scores from 0 (the lowest) to 1 (the highest), float64; 0 where all are equal."""
    score_N = score_N.double()
    return (score_N - score_N.min()) / (score_N.max() - score_N.min()).clamp(min=1e-12)


def nearest_slots(x_ND: Tensor, kept: list[int]) -> list[int]:
    """The slot of each token: its own, or that of the kept one most similar to it."""
    similar_NN = cosine(x_ND)
    return [
        kept.index(i) if i in kept else int(similar_NN[i, kept].argmax()) for i in range(len(x_ND))
    ]


def nearest_mean(x_ND: Tensor, kept: list[int]) -> Tensor:
    """Weights (K, N) by which each kept token becomes the mean of all tokens of its slot."""
    weight_KN = torch.zeros(len(kept), len(x_ND))
    weight_KN[nearest_slots(x_ND, kept), torch.arange(len(x_ND))] = 1
    return weight_KN / weight_KN.sum(dim=1, keepdim=True)
