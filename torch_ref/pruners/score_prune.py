"""EfficientVLM's score_prune: a small network scores every token, the K highest stay.

Shapes: B images, N tokens, D features.
"""

import copy

from torch import Tensor, nn
from torch.nn import functional as F

from .contract import Reduction, Signals
from .numerics import budget_in_turn, keep_highest, straight_through


class Scorer(nn.Module):
    def __init__(self, dims: int):
        super().__init__()
        self.norm = nn.LayerNorm(dims)
        self.fc1 = nn.Linear(dims, 64)
        self.fc2 = nn.Linear(64, 1)

    def forward(self, signals: Signals) -> Tensor:
        """Scores (B, N)."""
        return self.fc2(F.relu(self.fc1(self.norm(signals.x_BND))))[..., 0]

    def prune(self, signals: Signals, K: int) -> Reduction:
        exact = copy.deepcopy(self).double()
        score_BN = exact(signals.replace(x_BND=signals.x_BND.double()))
        return Reduction(keep_highest(score_BN.round(decimals=12), K))


def training_factor(weights: Scorer, signals: Signals, K: int, noise: float) -> Tensor:
    """On the attention that tokens get, (B, N)."""
    return straight_through(weights(signals), K, noise)


training_budget = budget_in_turn


def make_weights(dims: int, tokens: int) -> Scorer:
    return Scorer(dims)
