"""EfficientVLM's learned queries: K mixtures of all tokens, softmax(Q K^T / sqrt(D)) V.

Parameter names are EfficientVLM's, inside its `vision_proj`.

Shapes: B images, N tokens, D features, K slots.
"""

import torch
from torch import nn

from .contract import Reduction, Signals


class AttentionPool(nn.Module):
    """K queries of D features, one head."""

    def __init__(self, K: int, D: int):
        super().__init__()
        self.pool_queries = nn.Parameter(torch.randn(K, D))
        self.pool_q_proj = nn.Linear(D, D)
        self.pool_k_proj = nn.Linear(D, D)
        self.pool_v_proj = nn.Linear(D, D)

    def prune(self, signals: Signals, K: int) -> Reduction:
        """K must be the number of queries. The slots have no place in the image."""
        assert len(self.pool_queries) == K
        x_BND = signals.x_BND
        q_KD, k_BND = self.pool_q_proj(self.pool_queries), self.pool_k_proj(x_BND)
        scores_BKN = torch.einsum("kd,bnd->bkn", q_KD, k_BND).float() / x_BND.shape[-1] ** 0.5
        return Reduction(weight_BKN=scores_BKN.softmax(-1), value_BND=self.pool_v_proj(x_BND))


def make_weights(dims: int, tokens: int) -> AttentionPool:
    return AttentionPool(tokens, dims)
