"""K learned queries read the image: every slot is a mixture of all tokens.

EfficientVLM on MiniMind-V (github.com/langchengg/EfficientVLM) as its README describes it; no
commit of it has this code: one head,
softmax(Q K^T / sqrt(D)) V with learned Q, then the usual projector. K is baked into the weights.
The slots have no place in the image, so they are renumbered.

Shapes: B images, N tokens, D features, K slots.
"""

import mlx.core as mx
from mlx import nn

from .contract import Reduction, Signals, Stage

stage = Stage.FEATURES


class AttentionPool(nn.Module):
    """The weights, as they lie beside the model under `pruner.`."""

    def __init__(self, tokens: int, dims: int):
        super().__init__()
        self.queries = mx.random.normal((tokens, dims))
        self.q_proj = nn.Linear(dims, dims)
        self.k_proj = nn.Linear(dims, dims)
        self.v_proj = nn.Linear(dims, dims)

    @property
    def tokens(self) -> int:
        """The K these weights were made for."""
        return self.queries.shape[0]

    def prune(self, signals: Signals, K: int) -> Reduction:
        """Pool into K = `tokens` slots."""
        assert self.tokens == K, "the host asks for the number of queries"
        x_BND = signals.x_BND
        q_KD = self.q_proj(self.queries)
        logits_BKN = q_KD @ self.k_proj(x_BND).swapaxes(1, 2) / x_BND.shape[-1] ** 0.5
        weight_BKN = mx.softmax(logits_BKN.astype(mx.float32), axis=-1)
        return Reduction(weight_BKN=weight_BKN, value_BND=self.v_proj(x_BND))


def trained_tokens(weights: AttentionPool) -> int:
    """The one K that they were made for."""
    return weights.tokens


def make_weights(dims: int, tokens: int) -> AttentionPool:
    """Untrained weights for features of so many dimensions, and K = `tokens`."""
    return AttentionPool(tokens, dims)
