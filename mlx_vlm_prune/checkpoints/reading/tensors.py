"""A tensor as bytes, mapped from a file and read when it is written.

It stays raw bytes from file to file, so no value can change on the way, and bfloat16 needs
no library that knows it. Changes are made when the bytes are read: one tensor at a time is in
memory, not a checkpoint.
"""

import ctypes
import mmap
from collections.abc import Callable, Sequence
from contextlib import suppress
from math import prod
from typing import Protocol

import numpy as np

SIZES = {"F32": 4, "F16": 2, "BF16": 2, "U32": 4, "U8": 1}  # bytes per element of what we write
FLOATS = ("F32", "F16", "BF16")
PACKED = ("U32", "U8")  # words of quantized weights, and scales that are powers of two


class Shaped(Protocol):
    """Any tensor, whatever its library."""

    @property
    def shape(self) -> tuple[int, ...]: ...


class RawTensor:
    """`dtype` as safetensors names it (F32, F16, BF16, …); `data`: its bytes, row by row, flat
    uint8, mapped from a file or computed again at every reading."""

    def __init__(
        self,
        dtype: str,
        shape: Sequence[int],
        data: np.ndarray | Callable[[], np.ndarray],
        *,
        mapped: bool = False,
    ):
        self.dtype, self.shape = dtype, tuple(shape)
        self._data, self._mapped = data, mapped

    @property
    def data(self) -> np.ndarray:
        return self._data() if callable(self._data) else self._data

    @property
    def nbytes(self) -> int:
        """Known without reading anything."""
        size = SIZES.get(self.dtype)
        return self.data.nbytes if size is None else size * prod(self.shape)

    def forget(self) -> None:
        """Free the memory of mapped bytes that were read; they can be read again."""
        if self._mapped:
            free_pages(self.data)

    def permuted(self, axes: tuple[int, ...]) -> "RawTensor":
        """The same values with the axes in another order."""

        def compute() -> np.ndarray:
            elements = self.data.reshape(*self.shape, SIZES[self.dtype])
            moved = np.ascontiguousarray(elements.transpose(*axes, len(axes))).reshape(-1)
            return self._forget_unless_shared(moved)

        return RawTensor(self.dtype, [self.shape[axis] for axis in axes], compute)

    def rows(self, order: Sequence[int]) -> "RawTensor":
        """The same rows in another order."""

        def compute() -> np.ndarray:
            rows = self.data.reshape(self.shape[0], -1)[list(order)]
            return self._forget_unless_shared(rows.reshape(-1))

        return RawTensor(self.dtype, self.shape, compute)

    def reshaped(self, shape: tuple[int, ...]) -> "RawTensor":
        assert prod(shape) == prod(self.shape), (shape, self.shape)
        return RawTensor(self.dtype, shape, self._data, mapped=self._mapped)

    def astype(self, dtype: str) -> "RawTensor":
        """Rounded to the nearest value of F32, F16 or BF16, ties to even."""
        if dtype == self.dtype:
            return self

        def compute() -> np.ndarray:
            return self._forget_unless_shared(to_bytes(self.floats(), dtype))

        return RawTensor(dtype, self.shape, compute)

    def _forget_unless_shared(self, computed: np.ndarray) -> np.ndarray:
        if not np.shares_memory(computed, self.data):
            self.forget()
        return computed

    def floats(self) -> np.ndarray:
        """The values in float32, in the tensor's shape."""
        data = np.ascontiguousarray(self.data)
        if self.dtype == "BF16":
            float32 = (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            kind = {"F32": np.float32, "F16": np.float16}[self.dtype]
            float32 = data.view(kind).astype(np.float32)
        return float32.reshape(self.shape)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RawTensor):
            return NotImplemented
        same = (self.dtype, self.shape) == (other.dtype, other.shape)
        return same and np.array_equal(self.data, other.data)

    __hash__ = None  # type: ignore[assignment]  # equal by value: how Python spells it

    def __repr__(self) -> str:
        return f"RawTensor({self.dtype}, {self.shape})"


def free_pages(mapped: np.ndarray) -> None:
    """Free the pages that lie wholly inside an array, which is mapped and was not written to."""
    with suppress(OSError, AttributeError):
        page = mmap.PAGESIZE
        address = mapped.ctypes.data
        begin, end = -(-address // page) * page, (address + mapped.nbytes) // page * page
        if begin < end:
            advise = ctypes.CDLL(None).madvise
            advise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)


def to_bytes(float32: np.ndarray, dtype: str) -> np.ndarray:
    """Float32 values as the bytes of F32, F16 or BF16."""
    if dtype == "BF16":
        bits = np.ascontiguousarray(float32).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return (
            np.where(np.isnan(float32), 0x7FC0, rounded)
            .astype(np.uint16)
            .reshape(-1)
            .view(np.uint8)
        )
    with np.errstate(over="ignore"):  # beyond float16 becomes infinity, as in torch
        kind = {"F32": np.float32, "F16": np.float16}[dtype]
        return np.ascontiguousarray(float32, dtype=kind).reshape(-1).view(np.uint8)
