"""A checkpoint's tensors as MLX arrays, and back, bit for bit."""

from pathlib import Path

import mlx.core as mx
import numpy as np

from ..checkpoints.errors import UserError
from ..checkpoints.reading.files import open_safetensors
from ..checkpoints.reading.tensors import RawTensor

FLOATS = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}


def read_arrays(file: Path) -> dict[str, mx.array]:
    """The arrays of a safetensors file, not yet read; UserError for one that is not sound."""
    for name, tensor in open_safetensors(file).items():  # mx.load accepts what the format forbids
        if tensor.dtype == "F64":
            raise UserError(f"{file}: tensor {name} is F64, which MLX does not read")
    arrays = mx.load(str(file))
    assert isinstance(arrays, dict)
    return arrays


def to_array(tensor: RawTensor) -> mx.array:
    """The same bits as an mx.array; numpy has no bfloat16, so bits travel as integers."""
    integer = {2: np.uint16, 4: np.uint32, 1: np.uint8}[
        len(tensor.data) // max(1, int(np.prod(tensor.shape)))
    ]
    bits = mx.array(np.ascontiguousarray(tensor.data).view(integer).reshape(tensor.shape))
    return bits.view(FLOATS[tensor.dtype]) if tensor.dtype in FLOATS else bits


def to_bytes(array: mx.array) -> np.ndarray:
    """The array's bytes, flat uint8."""
    integer = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}[array.itemsize]
    return np.array(array.view(integer)).reshape(-1).view(np.uint8)


def to_raw(array: mx.array) -> RawTensor:
    """The same bits, computed, for a file."""
    codes = {dtype: code for code, dtype in FLOATS.items()} | {mx.uint32: "U32", mx.uint8: "U8"}
    return RawTensor(codes[array.dtype], array.shape, to_bytes(array))
