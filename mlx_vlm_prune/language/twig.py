"""A twig: layers, a norm and an output layer of its own, grown on an early layer of a base.

TwigVLM, arXiv:2503.14075. It reads what the base's layer `layer` reads, and was trained to say the
next word from there: what it looks at says which visual tokens go on (pruners/twig.py), and its
words are drafts of the base's (speculate.py).

Shapes: B prompts, L new tokens, D features, V words.
"""

import mlx.core as mx
from mlx import nn

from ..cache import LayerCache
from .minimind import DecoderLayer, MiniMindConfig, Rotary, Step


class Twig(nn.Module):
    """The weights, as they lie beside the model under `twig.`; of the base's sizes."""

    def __init__(self, config: MiniMindConfig, layers: int, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        self.layers = [DecoderLayer(config) for _ in range(layers)]
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def make_cache(self) -> list[LayerCache]:
        return [LayerCache() for _ in self.layers]

    def run(
        self,
        numbers: range,
        x_BLD: mx.array,
        positions_BL: mx.array,
        cache: list[LayerCache],
        *,
        padded: bool = False,
        bias_BL: mx.array | None = None,
    ) -> mx.array:
        """The base's hidden states through some of the twig's layers, whose caches grow."""
        rotary = Rotary(positions_BL, self.config.head_dim, self.config.rope_theta)
        step = Step(positions_BL, rotary, padded, bias_BL)
        for number in numbers:
            x_BLD = self.layers[number](x_BLD, step, cache[number])
        return x_BLD

    def logits(self, x_BLD: mx.array) -> mx.array:
        """Of the next word, from the last layer's hidden states, (B, L, V)."""
        return self.head(self.norm(x_BLD))
