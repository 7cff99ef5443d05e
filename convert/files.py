"""Checkpoint files: read what strangers wrote; write so that nothing half-written stays.

What is read is checked first: a safetensors header by the safetensors library, a .pth for
compressed or oversized parts, and its pickle is loaded with `weights_only`, which executes
nothing.
"""

import errno
import json
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from .errors import UserError
from .faults import fault
from .tensors import RawTensor

LARGEST_SIZE = (1 << 31) - 1  # along one axis of an mx.array
CHUNK = 1 << 24  # bytes written at a time


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; UserError where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is not valid JSON ({e})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object")
    return content


def check_safetensors(path: Path) -> None:
    """Refuse a file that the safetensors library finds fault with, before anything else maps it.

    Nor may a size exceed what MLX can count: it would take another without a word.
    """
    header(path)


def header(path: Path) -> tuple[dict[str, list[int]], str | None]:
    """The shape of each tensor in a safetensors file, and the framework that its metadata name.

    Raises UserError as `check_safetensors` says.
    """
    try:
        with safe_open(str(path), framework="np") as opened:
            shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
            form = (opened.metadata() or {}).get("format")
    except SafetensorError as e:
        raise UserError(f"{path} is no sound safetensors file: {fault(path) or e}") from None
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror or e}") from None
    for name, shape in shapes.items():
        if any(n > LARGEST_SIZE for n in shape):
            raise UserError(f"{path} is no sound safetensors file: {name!r} has the shape {shape}")
    return shapes, form


def open_safetensors(path: Path) -> dict[str, RawTensor]:
    """Every tensor of a file, mapped and not yet read."""
    check_safetensors(path)
    with path.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    if not header:
        return {}
    # Copy on write: torch takes no arrays that cannot be written to.
    body = np.memmap(path, dtype=np.uint8, mode="c")[8 + length :]
    return {
        name: RawTensor(
            about["dtype"], about["shape"], body[slice(*about["data_offsets"])], mapped=True
        )
        for name, about in header.items()
    }


def write_safetensors(path: Path, tensors: Mapping[str, RawTensor], form: str) -> None:
    """Write the tensors in the order of their names; the same tensors give the same bytes.

    `form` is the framework named in the metadata: mlx, or pt.
    """
    header: dict[str, Any] = {"__metadata__": {"format": form}}
    offset, names = 0, sorted(tensors)
    for name in names:
        tensor, end = tensors[name], offset + tensors[name].nbytes
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out, progress(offset, f"writing {path.name}") as bar:
        out.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            data = tensors[name].data
            for start in range(0, data.nbytes, CHUNK):
                out.write(np.ascontiguousarray(data[start : start + CHUNK]).data)
                bar.update(min(CHUNK, data.nbytes - start))
            tensors[name].forget()
    check_safetensors(path)


def progress(total: int, what: str) -> tqdm:
    """A bar in bytes that shows itself only where something takes a while."""
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, delay=1, leave=False)


def read_pth(path: Path) -> dict[str, RawTensor]:
    """The tensors of a .pth or .bin; those of `model` where it is a training checkpoint.

    Raises UserError where it is no zip archive of torch.save, or holds anything but tensors,
    or tensors larger than the file: a few bytes can claim gigabytes.
    """
    limit = _check_archive(path)
    torch = _torch(path)
    try:
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:  # whatever an unpickler of hostile bytes may raise
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise UserError(
            f"{path} is refused, nothing in it was executed: it must hold tensors only ({reason})"
        ) from None
    if isinstance(held, dict) and isinstance(held.get("model"), dict):
        held = held["model"]
    if not isinstance(held, dict) or not held:
        raise UserError(f"{path} holds no state dict, that is, no names with tensors")
    for name, value in held.items():
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            raise UserError(f"{path}: {name} is a {type(value).__name__}, not a plain tensor")
        if value.is_meta or value.is_quantized or value.nbytes > limit:
            raise UserError(f"{path}: tensor {name} claims more than the file holds")
    if sum(value.nbytes for value in held.values()) > 2 * limit:  # tied tensors count twice
        raise UserError(f"{path}: its tensors together claim more than the file holds")
    return {str(name): _raw(value) for name, value in held.items()}


def _check_archive(path: Path) -> int:
    """The size of a .pth in bytes, once its zip directory was found to be honest."""
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        raise UserError(
            f"{path} is no checkpoint of torch.save (a zip archive, since torch 1.6), or is damaged"
        ) from None
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise UserError(f"{path} is refused: torch.save does not compress, and this is compressed")
    if sum(entry.file_size for entry in entries) > size:
        raise UserError(f"{path} is refused: its parts claim more bytes than the file has")
    return size


def _torch(path: Path) -> Any:
    try:
        import torch
    except ImportError:
        raise UserError(f"{path} needs PyTorch; install it with: pip install torch") from None
    return torch


def _raw(tensor: Any) -> RawTensor:
    """The bytes of a torch tensor."""
    import torch

    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    dtype = names.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
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
    with path.open("wb") as out:
        watched = _Watched(out)
        try:
            torch.save(state, watched)
        except RuntimeError:  # torch hides what the disk said
            raise watched.problem or OSError(errno.EIO, "torch.save failed") from None


class _Watched:
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


@contextmanager
def appearing(target: Path, *, folder: bool) -> Iterator[Path]:
    """Yield a place beside `target` to write to; at the end it becomes `target`, whole.

    On any error, Ctrl-C too, nothing stays. What a killed run left is swept by the next.
    Raises UserError where the target exists, its folder does not, or the disk fills up.
    """
    target = target.absolute()
    if os.path.lexists(target):
        raise UserError(f"{target} exists already; give a new name, nothing is overwritten")
    if not target.parent.is_dir():
        raise UserError(f"there is no folder {target.parent} to write into")
    sweep(target)
    beside = target.with_name(f".{target.name}.part-{os.getpid()}")
    try:
        if folder:
            beside.mkdir()
        yield beside
        for path in [*(beside.iterdir() if folder else ()), beside]:
            _fsync(path)
        if os.path.lexists(target):
            raise UserError(f"{target} exists already; something else wrote it just now")
        beside.rename(target)
        _fsync(target.parent)
    except OSError as e:
        raise UserError(f"cannot write {target}: {e.strerror or e}; nothing was left") from None
    finally:
        remove(beside)


def sweep(target: Path) -> None:
    """Remove what killed runs left of this target; those under way are left alone."""
    for stray in target.parent.glob(f".{target.name}.part-*"):
        owner = stray.name.rpartition("-")[2]
        if owner.isdigit() and not _is_alive(int(owner)):
            remove(stray)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # somebody else's process
        return True
    return True


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
