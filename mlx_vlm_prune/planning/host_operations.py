"""Operation counts of mlx-vlm's models: their language model's, from the sizes of its weights.

Their towers differ too much to be counted by one formula, and are left out. Attention is counted
over all rows, also where a layer looks at a window of them only.
"""

from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

from ..hosts.host import Host
from .operations import MatrixSizes


def language_sizes(host: Host) -> MatrixSizes | None:
    """The sizes that a count needs; None for a language model of another build, as with experts."""
    if host.why_not_counted:
        return None
    try:
        body = getattr(host.language, "model", host.language)
        layers = body.layers
        query, key = (getattr(layers[0].self_attn, f"{x}_proj") for x in "qk")
        key_width = _shape(key)[0]
        heads = layers[0].self_attn.n_kv_heads
        sizes = {sum(_size(matrix) for matrix in _matrices(layer)) for layer in layers}
        vocabulary = body.embed_tokens.weight.shape[0]
        hidden_size = _shape(query)[1]
    except (AttributeError, IndexError):
        return None
    if len(sizes) != 1 or any(_has_experts(layer) for layer in layers):
        return None
    head_dim = key_width // heads
    return MatrixSizes(
        hidden_size=hidden_size, num_hidden_layers=len(layers), vocab_size=vocabulary,
        num_attention_heads=_shape(query)[0] // head_dim, num_key_value_heads=heads,
        head_dim=head_dim, layer_size=sizes.pop(),
    )  # fmt: skip


def row_bytes(host: Host) -> int:
    """The bytes of a row's keys and values in all layers. Layers of another build, as with a state
    in place of rows, are not counted."""
    layers = host.language.layers
    arrays: Any = tree_flatten(layers[0].parameters())
    floats = [array for _, array in arrays if mx.issubdtype(array.dtype, mx.floating)]
    attention = [getattr(layer, "self_attn", None) for layer in layers]
    parts = [getattr(part, f"{name}_proj", None) for part in attention for name in "kv"]
    itemsize = max(array.dtype.size for array in floats)
    return itemsize * sum(_shape(part)[0] for part in parts if part is not None)


def _matrices(layer: nn.Module) -> list[nn.Module]:
    """The linear layers inside a layer."""
    kinds = (nn.Linear, nn.QuantizedLinear)
    return [module for _, module in layer.named_modules() if isinstance(module, kinds)]


def _has_experts(layer: nn.Module) -> bool:
    """Whether matrices are stacked, of which a row meets some only."""
    weights = [getattr(module, "weight", None) for _, module in layer.named_modules()]
    return any(weight is not None and weight.ndim > 2 for weight in weights)


def _shape(matrix: Any) -> tuple[int, int]:
    """Outputs and inputs of a linear layer; a quantized one packs its inputs."""
    outputs, inputs = matrix.weight.shape
    if isinstance(matrix, nn.QuantizedLinear):
        inputs = inputs * 32 // matrix.bits
    return outputs, inputs


def _size(matrix: Any) -> int:
    outputs, inputs = _shape(matrix)
    return outputs * inputs
