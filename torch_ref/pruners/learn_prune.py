"""LearnPruner (arXiv:2604.23950): logits of drop and keep for each token; a tenth for diversity.

Shapes: B images, N tokens, D features.
"""

import copy

from torch import Tensor, nn
from torch.nn import functional as F

from .contract import Reduction, Signals, index_reduction
from .numerics import budget_in_turn, cosine, highest, straight_through


class KeepOrDrop(nn.Module):
    def __init__(self, dims: int):
        super().__init__()
        self.norm = nn.LayerNorm(dims)
        self.fc1 = nn.Linear(dims, max(1, dims // 2))
        self.fc2 = nn.Linear(max(1, dims // 2), 2)

    def forward(self, signals: Signals) -> Tensor:
        """The log of keep's share over drop's, (B, N)."""
        logits_BN2 = self.fc2(F.relu(self.fc1(self.norm(signals.x_BND))))
        return logits_BN2.diff(dim=-1)[..., 0]

    def prune(self, signals: Signals, K: int, *, diverse: float = 0.1) -> Reduction:
        exact = copy.deepcopy(self).double()
        score_BN = exact(signals.replace(x_BND=signals.x_BND.double())).round(decimals=12)
        count = max(1, K - int(K * diverse + 0.5))
        images = zip(signals.x_BND, score_BN, strict=True)
        kept = [add_unlike(cosine(x_ND), highest(s_N, count), K) for x_ND, s_N in images]
        return index_reduction(signals, kept)


def add_unlike(similar_NN: Tensor, chosen: list[int], K: int) -> list[int]:
    """With the tokens whose most similar chosen one is the least similar, one after another."""
    chosen = list(chosen)
    while len(chosen) < K:
        left = [i for i in range(len(similar_NN)) if i not in chosen]
        chosen.append(min(left, key=lambda i: (float(similar_NN[i, chosen].max()), i)))
    return sorted(chosen)


def training_factor(weights: KeepOrDrop, signals: Signals, K: int, noise: float) -> Tensor:
    """On the attention that tokens get, (B, N)."""
    return straight_through(weights(signals), K, noise)


training_budget = budget_in_turn


def make_weights(dims: int, tokens: int) -> KeepOrDrop:
    return KeepOrDrop(dims)
