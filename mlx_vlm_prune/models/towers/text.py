"""The text towers of CLIP (arXiv:2103.00020) and SigLIP (arXiv:2303.15343).

Attribute names equal Hugging Face's. CLIP's attention is causal and its text is what stands at the
end token; SigLIP's sees all tokens, padding too, and its text is what stands at the last.

Shapes: T texts, L tokens of each, D features.
"""

import mlx.core as mx
import numpy as np
from mlx import nn

from ...checkpoints.dual_encoder import LEGACY_EOS, TextTowerConfig
from .vit import Activation, Encoder


class TextEmbeddings(nn.Module):
    def __init__(self, c: TextTowerConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(c.vocab_size, c.hidden_size)
        self.position_embedding = nn.Embedding(c.max_position_embeddings, c.hidden_size)

    def __call__(self, ids_TL: mx.array) -> mx.array:
        return self.token_embedding(ids_TL) + self.position_embedding.weight[: ids_TL.shape[1]]


class TextTower(nn.Module):
    """Token ids to one vector each. `head_dim` is that of SigLIP's head; None is CLIP's tower."""

    def __init__(self, config: TextTowerConfig, head_dim: int | None, act: Activation):
        super().__init__()
        self.config, self.is_clip = config, head_dim is None
        self.embeddings = TextEmbeddings(config)
        self.encoder = Encoder(config, act)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        if head_dim is not None:
            self.head = nn.Linear(config.hidden_size, head_dim)

    def __call__(self, ids_TL: np.ndarray) -> mx.array:
        """(T, D), before CLIP's projection."""
        x_TLD = self.embeddings(mx.array(ids_TL))
        mask = "causal" if self.is_clip else None
        for layer in self.encoder.layers:
            x_TLD = x_TLD + layer.self_attn(layer.layer_norm1(x_TLD), mask)[0]
            x_TLD = x_TLD + layer.mlp(layer.layer_norm2(x_TLD))
        x_TLD = self.final_layer_norm(x_TLD)
        if not self.is_clip:
            return self.head(x_TLD[:, -1])
        return x_TLD[mx.arange(len(ids_TL)), mx.array(self._ends(ids_TL))]

    def _ends(self, ids_TL: np.ndarray) -> np.ndarray:
        """Where each text's first end token is; of a config from before its id was right, the
        largest id's place."""
        eos = self.config.eos_token_id
        return (ids_TL if eos == LEGACY_EOS else ids_TL == eos).argmax(axis=1)
