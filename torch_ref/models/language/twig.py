"""A twig: layers, a norm and an output layer of its own, grown on the output of an early layer.

TwigVLM, arXiv:2503.14075. It reads what the base's layer `layer` would read, and is trained
to say the next word at once.

Shapes: B rows, L tokens, D features, V words.
"""

import copy

import torch
from torch import Tensor, nn

from mlx_vlm_prune.checkpoints.config import MiniMindConfig

from .minimind import Layer, MiniMind, RMSNorm, rotary_table


class Twig(nn.Module):
    """Untrained, of so many layers; `layer` is a tensor, so that it is saved along."""

    layer: Tensor

    def __init__(self, c: MiniMindConfig, layers: int, layer: int):
        super().__init__()
        self.config = c
        self.layers = nn.ModuleList(Layer(c) for _ in range(layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        self.register_buffer("layer", torch.tensor([float(layer)]))

    def rotary(self, positions_BL: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of every position, as the layers take them."""
        return rotary_table(positions_BL, self.config.head_dim, self.config.rope_theta)

    def forward(self, x_BLD: Tensor, positions_BL: Tensor, mask_BLL: Tensor) -> Tensor:
        """Hidden states (B, L, D) after its norm, of the base's at its layer."""
        rotary = self.rotary(positions_BL)
        for layer in self.layers:
            x_BLD = layer(x_BLD, rotary, mask_BLL[:, None], None)
        return self.norm(x_BLD)


def grown(language: MiniMind, layer: int, layers: int) -> Twig:
    """One that begins as the base's own layers from `layer` on, its final norm and output layer.

    Raises ValueError where the base has no such layers.
    """
    depth = len(language.layers)
    if not 1 <= layer < depth or not 1 <= layers <= depth - layer:
        raise ValueError(
            f"a twig of {layers} layers on layer {layer} has no beginning in {depth} layers"
        )
    twig = Twig(language.config, layers, layer)
    twig.layers = copy.deepcopy(language.layers[layer : layer + layers])
    twig.norm = copy.deepcopy(language.norm)
    tied = language.config.tie_word_embeddings
    head = language.embed_tokens if tied else language.lm_head
    twig.head.weight = nn.Parameter(head.weight.detach().clone())
    return twig.requires_grad_()
