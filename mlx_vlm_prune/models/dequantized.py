"""A quantized checkpoint with full matrices again, tensor by tensor as they are written."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from ..checkpoints.checkpoint import DTYPES, Checkpoint
from ..checkpoints.errors import UserError
from ..checkpoints.quantization import PARTS, packing
from ..checkpoints.reading.tensors import RawTensor
from .arrays import FLOATS, to_array, to_bytes


def dequantised(checkpoint: Checkpoint, dtype: str | None = None) -> Checkpoint:
    """The checkpoint with full matrices again, as near to the original as its bits allow.

    They are in `dtype`, or in the torch_dtype of its config.json.
    """
    settings = checkpoint.config.get("quantization")
    if not isinstance(settings, Mapping):
        raise UserError("the source is not quantized: there is nothing to undo")
    code = DTYPES.get(dtype or checkpoint.config.get("torch_dtype", "float32"), "F32")
    tensors = {}
    for name, tensor in checkpoint.tensors.items():
        prefix, _, part = name.rpartition(".")
        if part not in PARTS or f"{prefix}.scales" not in checkpoint.tensors:
            tensors[name] = tensor  # a bias too: `biases` is another thing
        elif part == "weight":
            parts = [checkpoint.tensors.get(f"{prefix}.{part}") for part in PARTS]
            tensors[name] = _unpack(parts, packing(settings), code)
    config = {k: v for k, v in checkpoint.config.items() if not k.startswith("quantization")}
    return replace(checkpoint, config=config, tensors=tensors)


def _unpack(parts: list[RawTensor | None], settings: Mapping[str, Any], dtype: str) -> RawTensor:
    """The full matrix of weight, scales and, in some modes, biases."""
    weight, scales = parts[:2]
    assert weight and scales

    def compute() -> np.ndarray:
        with mx.stream(mx.cpu):
            # Scales in float32: a product rounded to sixteen bits twice would be another.
            arrays: list[Any] = [part and to_array(part) for part in parts]
            are_floats = [part and part.dtype in FLOATS for part in parts]
            pairs = zip(arrays, are_floats, strict=True)
            arrays = [array.astype(mx.float32) if is_float else array for array, is_float in pairs]
            data = to_bytes(mx.dequantize(*arrays, **settings).astype(FLOATS[dtype]))
        for part in filter(None, parts):
            part.forget()
        return data

    shape = (weight.shape[0], scales.shape[1] * settings["group_size"])
    return RawTensor(dtype, shape, compute)
