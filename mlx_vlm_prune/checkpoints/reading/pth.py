"""PyTorch's own checkpoint files. Only this file imports torch, and only for such a file.

The archive and its pickle are checked before torch sees them; torch then loads with `weights_only`,
which executes nothing.
"""

import errno
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError, missing_package, reason
from .pth_archive import read_pickle
from .pth_pickle import check_pickle
from .tensors import RawTensor

DTYPES = {  # safetensors' names of torch's
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64",
    "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip


def read_pth(path: Path) -> dict[str, RawTensor]:
    """The tensors of a .pth or .bin; those of `model` where it is a training checkpoint.

    Raises UserError where it is no zip archive of torch.save, or holds anything but tensors,
    or tensors larger than the file: a few bytes can claim gigabytes.
    """
    data, limit = read_pickle(path), path.stat().st_size
    torch = _torch(path)
    try:
        check_pickle(data)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:  # whatever an unpickler of hostile bytes may raise
        raise UserError(
            f"{path} is refused, nothing in it was executed: it must hold tensors only"
            f" ({reason(e)})"
        ) from None
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path} holds no state dict, that is, no names with tensors")
    for name, value in content.items():
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            raise UserError(f"{path}: {name} is a {type(value).__name__}, not a plain tensor")
        if value.is_meta or value.is_quantized or value.nbytes > limit:
            raise UserError(f"{path}: tensor {name} claims more than the file holds")
    if sum(value.nbytes for value in content.values()) > 2 * limit:  # tied tensors count twice
        raise UserError(f"{path}: its tensors together claim more than the file holds")
    return {str(name): raw_tensor(value) for name, value in content.items()}


def _torch(path: Path) -> Any:
    try:
        import torch
    except ImportError:
        raise missing_package("torch", path) from None
    return torch


def raw_tensor(tensor: Any) -> RawTensor:
    """The bytes of a torch tensor."""
    import torch

    kind = str(tensor.dtype).removeprefix("torch.")
    dtype = DTYPES.get(kind, kind)
    data = tensor.detach().contiguous().flatten().view(torch.uint8).numpy()
    return RawTensor(dtype, tensor.shape, data, mapped=tensor.is_contiguous())


def write_pth(path: Path, tensors: Mapping[str, RawTensor]) -> None:
    """Write a state dict as torch.save does, in the order given."""
    torch = _torch(path)
    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    state = {}
    for name, tensor in tensors.items():
        data = torch.from_numpy(tensor.data)
        state[name] = data.view(kinds[tensor.dtype]).reshape(tensor.shape)
    save(path, state)


def save(path: Path, content: Any) -> None:
    """torch.save, but what the disk refuses is an OSError that says why."""
    torch = _torch(path)
    with path.open("wb") as out:
        watched = _WatchedFile(out)
        try:
            torch.save(content, watched)
        except RuntimeError:  # torch hides what the disk said
            raise watched.problem or OSError(errno.EIO, "torch.save failed") from None


class _WatchedFile:
    """A file that remembers why a write failed."""

    def __init__(self, file: Any):
        self.file = file
        self.problem: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as e:
            self.problem = e
            raise

    def flush(self) -> None:
        self.file.flush()
