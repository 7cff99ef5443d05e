"""LightVLM's scorer: features and CLS attention to usefulness, pooled features to a budget.

Shapes: B images, N tokens, D features.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .contract import Reduction, Signals
from .numerics import budget_in_turn, keep_highest, straight_through

needs: dict[str, str | None] = {"cls_attention": "layer"}


class Usefulness(nn.Module):
    mean_need: Tensor

    def __init__(self, dims: int):
        super().__init__()
        self.norm = nn.LayerNorm(dims)
        self.fc1 = nn.Linear(dims + 1, 64)
        self.fc2 = nn.Linear(64, 1)
        self.need = nn.Linear(dims, 1)
        self.register_buffer("mean_need", torch.ones(1))

    def forward(self, signals: Signals) -> Tensor:
        """Scores (B, N)."""
        attention_BN1 = (signals.cls_attention_BN * signals.x_BND.shape[1] + 1e-6).log()[..., None]
        input_BND = torch.cat([self.norm(signals.x_BND), attention_BN1], dim=-1)
        return self.fc2(F.relu(self.fc1(input_BND)))[..., 0]

    def log_need(self, signals: Signals) -> Tensor:
        """The log of how many tokens each image needs, (B,)."""
        return self.need(self.norm(signals.x_BND).mean(dim=1))[:, 0]

    def prune(
        self, signals: Signals, K: int, *, dynamic: bool = False, layer: float = -1
    ) -> Reduction:
        score_BN = copy.deepcopy(self).double()(in_double(signals))
        return Reduction(keep_highest(score_BN.round(decimals=12), K))

    def budgets(self, signals: Signals, K: int) -> list[int]:
        """Each image's budget; their mean is K over images like those of the training."""
        exact = copy.deepcopy(self).cpu().double()  # Apple's GPU has no float64
        log_need_B = exact.log_need(in_double(signals.to("cpu")))
        budget_B = (K * log_need_B.exp() / exact.mean_need + 0.5).floor()
        return budget_B.clamp(1, signals.x_BND.shape[1]).int().tolist()


def in_double(signals: Signals) -> Signals:
    attention_BN = signals.cls_attention_BN.double()
    return signals.replace(x_BND=signals.x_BND.double(), cls_attention_BN=attention_BN)


def training_factor(weights: Usefulness, signals: Signals, K: int, noise: float) -> Tensor:
    """On the attention that tokens get, (B, N)."""
    return straight_through(weights(signals), K, noise)


training_budget = budget_in_turn


def training_loss(weights: Usefulness, signals: Signals, gradient_BN: Tensor) -> Tensor:
    """The squared error of the log of the needs, a mean over images; the mean need follows."""
    share_BN = gradient_BN.abs() / gradient_BN.abs().sum(dim=1, keepdim=True).clamp(min=1e-12)
    entropy_B = -(share_BN * share_BN.clamp(min=1e-12).log()).sum(dim=1)
    if weights.mean_need.item() == 1:  # untrained: start where the needs are
        with torch.no_grad():
            weights.need.bias.add_(entropy_B.mean() - weights.log_need(signals).mean())
            weights.mean_need.copy_(entropy_B.exp().mean())
    predicted_B = weights.log_need(signals)
    weights.mean_need.lerp_(predicted_B.detach().exp().mean(), 0.02)
    return F.mse_loss(predicted_B, entropy_B)


def make_weights(dims: int, tokens: int) -> Usefulness:
    return Usefulness(dims)
