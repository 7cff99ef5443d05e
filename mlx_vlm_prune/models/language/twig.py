"""A twig: layers, a norm and an output layer of its own, grown on an early layer of a base.

TwigVLM, arXiv:2503.14075. It reads what the base's layer `layer` reads, and was trained to say the
next word from there: what it looks at says which visual tokens go on (pruners/twig.py), and its
words are drafts of the base's (speculate.py).

Shapes: B prompts, L new tokens, D features, V words.
"""

from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_map

from ...checkpoints.config import MiniMindConfig
from ...checkpoints.errors import UserError
from .minimind import DecoderLayer, LayerStack, MiniMind


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


def grown(language: MiniMind, layer: int, layers: int) -> Twig:
    """One that begins as the base's own layers from `layer` on, its final norm and output layer.

    Raises UserError where the base has no such layers.
    """
    depth, text = len(language.layers), language.config
    if not 1 <= layer < depth or not 1 <= layers <= depth - layer:
        raise UserError(
            f"a twig of {layers} layers on layer {layer} has no beginning in {depth} layers; it"
            f" grows on layer 1 to {depth - 1} and has at most the layers from there on"
        )
    twig = Twig(text, layers, layer)
    for ours, base in zip(twig.layers, language.layers[layer : layer + layers], strict=True):
        ours.update(_copy(base.parameters()))
    twig.norm.update(_copy(language.norm.parameters()))
    head = language.embed_tokens if text.tie_word_embeddings else language.lm_head
    twig.head.update(_copy({"weight": head.weight}))
    return twig


def _copy(parameters: Any) -> Any:
    """Arrays of their own: an update of one is none of the other."""
    return tree_map(mx.array, parameters)
