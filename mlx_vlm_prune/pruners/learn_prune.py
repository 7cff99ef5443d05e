"""A small network learns which tokens to keep; the last tenth of them are unlike the others.

LearnPruner, Takezoe et al., ICLR 2026, arXiv:2604.23950; no code is public, and this is from notes
on the paper. A network of one hidden layer, half as wide as the tower's features, gives each token
two logits: drop it, keep it. Tokens are ranked by the share of keep in their softmax. Of K the
highest stay but for a tenth, which adds what lies in the background: again and again the token
whose highest cosine to those chosen is the lowest. In the paper the language model's layer 12 goes
on, by its words' attention, with a third of them: `learn_prune+fastv:layer=0.375` comes near that.

The paper trains by a straight-through mask of the larger logit, the model frozen. The notes do not
say how many tokens then stay. Here it is K, as in `score_prune`: the mask's gradient is that of the
share of keep, less the logit of the K-th. The norm in front of the network is ours.
`scenes-deep` has weights of it; the built-in model has none.

Options:
    diverse: share of K that is chosen for being unlike the others, 0 to 1

Shapes: B images, N tokens, D features, K kept, C of them by their score.
"""

import mlx.core as mx
from mlx import nn

from .contract import Reduction, Signals, Stage, take
from .numerics import (
    after_step,
    choosing,
    fused,
    keep_highest,
    keep_marked,
    mask_of,
    rounded,
    unit,
)
from .rows import cosine_rows, nearest
from .scorer import budget_in_turn, layer_norm, linear, straight_through

stage = Stage.FEATURES
CHOSEN = 4.0  # in place of a chosen token's cosine; any other is at most 1, but for rounding


class KeepOrDrop(nn.Module):
    """The weights, as they lie beside the model under `learn_prune.`."""

    def __init__(self, dims: int):
        super().__init__()
        hidden = max(1, dims // 2)
        self.norm = nn.LayerNorm(dims)
        self.fc1 = nn.Linear(dims, hidden)
        self.fc2 = nn.Linear(hidden, 2)

    def __call__(self, signals: Signals) -> mx.array:
        """How far the logit of keep lies above that of drop, (B, N), with gradients."""
        x_BND = self.norm(signals.x_BND.astype(mx.float32))
        logits_BN2 = self.fc2(nn.relu(self.fc1(x_BND)))
        return logits_BN2[..., 1] - logits_BN2[..., 0]

    def prune(self, signals: Signals, K: int, *, diverse: float = 0.1) -> Reduction:
        """Keep K: the highest shares of keep, and tokens unlike these."""
        if not 0 <= diverse <= 1:
            raise ValueError(f"diverse is {diverse:g}; it is a share of K from 0 to 1")
        with choosing():
            x_BND = layer_norm(signals.x_BND, self.norm)
            logits_BN2 = linear(mx.maximum(linear(x_BND, self.fc1), 0), self.fc2)
            score_BN = rounded(logits_BN2[..., 1] - logits_BN2[..., 0])  # in the shares' order
            chosen_BC = keep_highest(score_BN, max(1, K - int(K * diverse + 0.5)))
            return Reduction(with_diverse(signals.x_BND, chosen_BC, K), score_BN=score_BN)


def with_diverse(x_BND: mx.array, chosen_BC: mx.array, K: int) -> mx.array:
    """Of K tokens the first C, and greedily those whose nearest chosen one is the least like them,
    (B, K) ascending."""
    unit_BND, similar = unit(x_BND), cosine_rows(x_BND, hold=False)
    token_N = mx.arange(x_BND.shape[1], dtype=mx.uint32)
    nearest_BN = nearest(unit_BND, take(unit_BND, chosen_BC))[0]
    nearest_BN = mx.where(mask_of(chosen_BC, similar.N), CHOSEN, nearest_BN)
    for step in range(1, K - chosen_BC.shape[1] + 1):
        i_B1 = mx.argmin(nearest_BN, axis=-1, keepdims=True)
        nearest_BN = nearest_after(nearest_BN, similar.take(i_B1)[:, 0], i_B1, token_N)
        after_step(step, nearest_BN)
    return keep_marked(nearest_BN == CHOSEN, K)


@fused
def nearest_after(
    nearest_BN: mx.array, similar_BN: mx.array, i_B1: mx.array, token_N: mx.array
) -> mx.array:
    """The highest cosines to chosen tokens when one more is chosen."""
    return mx.where(token_N == i_B1, CHOSEN, mx.maximum(nearest_BN, similar_BN))


def make_weights(dims: int, tokens: int) -> KeepOrDrop:
    """Untrained weights for features of so many dimensions; any budget."""
    return KeepOrDrop(dims)


def training_factor(weights: KeepOrDrop, signals: Signals, K: int, noise: float) -> mx.array:
    """On the attention that tokens get, (B, N)."""
    return straight_through(weights(signals), K, noise)


training_budget = budget_in_turn
