"""How many multiply-adds each part of a model must do, from its configuration alone.

Shapes: S tower tokens with CLS, N visual tokens, K of them in a layer, L rows of a prompt.
"""

from collections.abc import Sequence

from mlx_vlm_prune.model import VLMConfig


def tower(c: VLMConfig) -> int:
    """Multiply-adds of the vision tower for one image."""
    v = c.vision
    N = v.grid[0] * v.grid[1]
    S, D = N + 1, v.hidden_size
    patches = N * D * 3 * v.patch_size**2
    layer = S * (4 * D * D + 2 * D * v.intermediate_size) + 2 * S * S * D
    return patches + v.num_hidden_layers * layer


def prefill(c: VLMConfig, text: int, held: Sequence[int], projected: int) -> int:
    """Multiply-adds of projector and language model for a prompt of `text` words, with
    `held` visual tokens in each layer, of which `projected` went through the projector.

    Attention counts the full L x L: a CPU computes the masked half too.
    """
    t = c.text
    D, heads = t.hidden_size, t.num_attention_heads * t.head_dim
    linear = 2 * D * heads + 2 * D * t.num_key_value_heads * t.head_dim
    linear += 3 * D * t.intermediate_size
    layers = sum((text + K) * linear + 2 * (text + K) ** 2 * heads for K in held)
    return projected * c.vision.hidden_size * D + layers + D * t.vocab_size
