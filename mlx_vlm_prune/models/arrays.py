"""A checkpoint's tensors as MLX arrays, and back, bit for bit."""

from pathlib import Path

import mlx.core as mx
import numpy as np

from ..checkpoints.errors import UserError, reason
from ..checkpoints.reading.files import read_header
from ..checkpoints.reading.tensors import RawTensor

FLOATS = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
DTYPES = FLOATS | {"U32": mx.uint32, "U8": mx.uint8}  # of what is quantized, too


def read_arrays(file: Path) -> dict[str, mx.array]:
    """The arrays of a safetensors file, not yet read; UserError for one that is not sound, or has
    a type that MLX does not read."""
    read_header(file)  # mx.load accepts what the format forbids
    try:
        arrays = mx.load(str(file))
    except RuntimeError as problem:
        raise UserError(f"MLX cannot read {file}: {reason(problem)}") from None
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
    codes = {dtype: code for code, dtype in DTYPES.items()}
    return RawTensor(codes[array.dtype], array.shape, to_bytes(array))
