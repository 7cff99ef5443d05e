"""A twig: layers, a norm and an output layer of its own, grown on an early layer of a base.

TwigVLM, arXiv:2503.14075. It reads what the base's layer `layer` reads, and was trained to say the
next word from there: what it looks at says which visual tokens go on (pruners/twig.py), and its
words are drafts of the base's (speculate.py).

Shapes: B prompts, L new tokens, D features, V words.
"""

import mlx.core as mx
from mlx import nn

from ...checkpoints.config import MiniMindConfig
from .minimind import DecoderLayer, LayerStack


class Twig(LayerStack):
    """The weights, as they lie beside the model under `twig.`; of the base's sizes."""

    def __init__(self, config: MiniMindConfig, layers: int, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        self.layers = [DecoderLayer(config) for _ in range(layers)]
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def logits(self, x_BLD: mx.array) -> mx.array:
        """Of the next word, from the last layer's hidden states, (B, L, V)."""
        return self.head(self.norm(x_BLD))
