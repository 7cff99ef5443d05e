"""Quantized matrices as float32 of the same values: a CPU multiplies those much faster."""

from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_unflatten

from ..models.language.experts import ExpertLinear, QuantizedExpertLinear

QUANTIZED = (nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedExpertLinear)


def dequantize_matrices(model: nn.Module) -> int:
    """Replace a model's quantized matrices in place; how many there were."""
    replaced = [
        (path, _dequantized(module))
        for path, module in model.named_modules()
        if isinstance(module, QUANTIZED)
    ]
    model.update_modules(tree_unflatten(replaced))
    return len(replaced)


def _dequantized(module: nn.Module) -> nn.Module:
    options: dict[str, Any] = getattr(module, "format", None) or {
        "group_size": module.group_size,
        "bits": module.bits,
        "mode": module.mode,
    }
    weight = mx.dequantize(module.weight, module.scales, module.get("biases"), **options)
    plain: nn.Module
    if isinstance(module, nn.QuantizedLinear):
        plain = nn.Linear(1, 1, bias=False)
        if "bias" in module:
            plain.bias = module.bias
    elif isinstance(module, nn.QuantizedEmbedding):
        plain = nn.Embedding(1, 1)
    else:
        plain = ExpertLinear(1, 1, 1)
    plain.weight = weight.astype(mx.float32)
    return plain
