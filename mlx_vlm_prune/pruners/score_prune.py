"""A small network, trained on the model's own task, scores every token.

EfficientVLM on MiniMind-V (github.com/langchengg/EfficientVLM), `score_prune`: "a lightweight
scorer ranks token importance, keeps Top-K". No commit of it has the code, so layout and
training are ours: a norm, one hidden layer and a number per token. It learns from the
answers' loss alone, by a straight-through top-K: only the K highest stay visible, and
the loss reaches all scores through the attention that the tokens get, or would get.

Shapes: B images, N tokens, D features, K kept.
"""

import mlx.core as mx
from mlx import nn

from .contract import Reduction, Signals, Stage
from .numerics import choosing, keep_highest
from .scorer import budget_in_turn, layer_norm, score, straight_through

stage = Stage.FEATURES
HIDDEN = 64


class Scorer(nn.Module):
    """The weights, as they lie beside the model under `score_prune.`."""

    def __init__(self, dims: int):
        super().__init__()
        self.norm = nn.LayerNorm(dims)
        self.fc1 = nn.Linear(dims, HIDDEN)
        self.fc2 = nn.Linear(HIDDEN, 1)

    def __call__(self, signals: Signals) -> mx.array:
        """Scores (B, N), with gradients."""
        x_BND = self.norm(signals.x_BND.astype(mx.float32))
        return self.fc2(nn.relu(self.fc1(x_BND)))[..., 0]

    def prune(self, signals: Signals, K: int) -> Reduction:
        """Keep the K highest scores."""
        with choosing():
            score_BN = score(layer_norm(signals.x_BND, self.norm), self.fc1, self.fc2)
            return Reduction(keep_highest(score_BN, K), score_BN=score_BN)


def make_weights(dims: int, tokens: int) -> Scorer:
    """Untrained weights for features of so many dimensions; any budget."""
    return Scorer(dims)


def training_factor(weights: Scorer, signals: Signals, K: int, noise: float) -> mx.array:
    """On the attention that tokens get, (B, N)."""
    return straight_through(weights(signals), K, noise)


training_budget = budget_in_turn
