"""How many multiply-adds each part of a model must do, from its configuration alone.

Shapes: S tower tokens with CLS, N visual tokens, L tokens of the spliced prompt.
"""

from mlx_vlm_prune.model import VLMConfig


def tower(c: VLMConfig) -> int:
    """Multiply-adds of the vision tower for one image."""
    v = c.vision
    N = v.grid[0] * v.grid[1]
    S, D = N + 1, v.hidden_size
    patches = N * D * 3 * v.patch_size**2
    layer = S * (4 * D * D + 2 * D * v.intermediate_size) + 2 * S * S * D
    return patches + v.num_hidden_layers * layer


def prefill(c: VLMConfig, L: int, K: int) -> int:
    """Multiply-adds of projector and language model for a prompt of L tokens, K of them visual.

    Attention counts the full L x L: a CPU computes the masked half too.
    """
    t = c.text
    D, d = t.hidden_size, t.head_dim
    heads = t.num_attention_heads * d
    linear = 2 * D * heads + 2 * D * t.num_key_value_heads * d + 3 * D * t.intermediate_size
    layer = L * linear + 2 * L * L * heads
    return K * c.vision.hidden_size * D + t.num_hidden_layers * layer + D * t.vocab_size
