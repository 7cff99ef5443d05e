"""JSON and safetensors files: checked as they are read, written whole or not at all.

The safetensors library checks the headers.
"""

import glob
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from ..errors import UserError, quoted
from .paths import LARGEST_JSON, check_regular, is_here
from .safetensors_faults import first_fault, is_header_too_long
from .tensors import RawTensor

LARGEST_SIZE = (1 << 31) - 1  # along one axis of an mx.array
CHUNK = 1 << 24  # bytes read or written at a time


def parse_json(text: bytes | str, encoding: str = "utf-8", pairs: Any = None) -> Any:
    """The JSON value of a text; ValueError, the end of a sentence, where it is none. `pairs` makes
    an object of its names and values."""
    try:
        decoded = text.decode(encoding) if isinstance(text, bytes) else text
        return json.loads(decoded, object_pairs_hook=pairs)
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except ValueError as e:
        raise ValueError(f"is not valid JSON ({e})") from None


def read_json(
    path: Path, kind: type = dict, encoding: str = "utf-8", most: int | None = LARGEST_JSON
) -> Any:
    """What a JSON file of at most `most` bytes holds: an object (`dict`), or else a `list`;
    UserError otherwise."""
    check_regular(path, most)
    try:
        content = parse_json(path.read_bytes(), encoding)
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror or e}") from None
    except ValueError as e:
        raise UserError(f"{path} {e}") from None
    if not isinstance(content, kind):
        raise UserError(f"{path} must hold a JSON {'object' if kind is dict else 'list'}")
    return content


def optional_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no file."""
    return read_json(path) if is_here(path) else {}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Sorted, indented by four, as mlx-lm writes it; into a folder that is about to appear."""
    text = json.dumps(content, indent=4, sort_keys=True, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")


def read_header(path: Path) -> tuple[dict[str, list[int]], str | None]:
    """The shape of each tensor in a safetensors file, and the framework in its metadata.

    Raises UserError for a file that the safetensors library refuses, for a name that occurs twice,
    which readers take differently, for a header too long to hold, and for a size that MLX cannot
    count: MLX would silently take another.
    """
    header, _ = _checked_header(path)
    framework = (header.pop("__metadata__", None) or {}).get("format")
    return {name: entry["shape"] for name, entry in header.items()}, framework


def _checked_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header, and where the tensors' bytes begin."""
    check_regular(path)
    try:
        if is_header_too_long(path):
            raise SafetensorError("its header is too long")
        with safe_open(str(path), framework="np"):  # checks all
            pass
        with path.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = parse_json(opened.read(length), pairs=_each_name_once)
    except SafetensorError as e:
        raise UserError(f"{path} is no sound safetensors file: {first_fault(path) or e}") from None
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror or e}") from None
    except ValueError as e:
        raise UserError(f"{path} is no sound safetensors file: its header {e}") from None
    for name, entry in header.items():
        if name != "__metadata__" and any(n > LARGEST_SIZE for n in entry["shape"]):
            raise UserError(
                f"{path} is no sound safetensors file: {quoted(name)} has the shape"
                f" {quoted(entry['shape'])}"
            )
    return header, 8 + length


def _each_name_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names: dict[str, Any] = {}
    for name, value in pairs:
        if name in names:
            raise ValueError(f"names {name[:80]!r} twice")
        names[name] = value
    return names


def open_safetensors(path: Path) -> dict[str, RawTensor]:
    """Every tensor of a file, mapped and not yet read."""
    header, begin = _checked_header(path)
    header.pop("__metadata__", None)
    if not header:
        return {}
    # Copy on write: torch takes no arrays that cannot be written to.
    body = np.memmap(path, dtype=np.uint8, mode="c")[begin:]
    return {
        name: RawTensor(
            entry["dtype"], entry["shape"], body[slice(*entry["data_offsets"])], mapped=True
        )
        for name, entry in header.items()
    }


def write_safetensors(path: Path, tensors: Mapping[str, RawTensor], framework: str) -> None:
    """Write the tensors in the order of their names; the same tensors give the same bytes.

    `framework` is written into the metadata: mlx, or pt.
    """
    header: dict[str, Any] = {"__metadata__": {"format": framework}}
    offset, names = 0, sorted(tensors)
    for name in names:
        tensor, end = tensors[name], offset + tensors[name].nbytes
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out, progress_bar(offset, f"writing {path.name}") as bar:
        out.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            data = tensors[name].data
            for start in range(0, data.nbytes, CHUNK):
                out.write(np.ascontiguousarray(data[start : start + CHUNK]).data)
                bar.update(min(CHUNK, data.nbytes - start))
            tensors[name].forget()
    read_header(path)


def progress_bar(total: int, title: str) -> tqdm:
    """A bar in bytes that appears after a second."""
    return tqdm(total=total, desc=title, unit="B", unit_scale=True, delay=1, leave=False)


def check_target(target: Path, *, replace: bool) -> None:
    """UserError for a path that cannot be written to; with `replace` a file may be there.

    An empty file is written beside it, and removed.
    """
    _check_place(target, replace)
    beside = _beside(target)
    try:
        beside.touch()
    except OSError as e:
        raise UserError(f"cannot write {target}: {e.strerror or e}") from None
    finally:
        _remove(beside)


def _beside(target: Path) -> Path:
    """What is written first, to take the target's place when it is whole."""
    return target.absolute().with_name(f".{target.absolute().name}.part-{os.getpid()}")


def _check_place(target: Path, replace: bool) -> None:
    if not target.absolute().parent.is_dir():
        raise UserError(
            f"there is no folder {target.absolute().parent} to write {target.name} into"
        )
    if not replace and os.path.lexists(target):
        raise UserError(f"{target} exists already; give a new name, nothing is overwritten")
    if target.is_dir():
        raise UserError(f"{target} is a folder; name a file in it")
    if target.exists() and not target.is_file():  # a device or a pipe is no place for a file
        raise UserError(f"{target} is no regular file, and is not replaced by one")


@contextmanager
def atomic_path(target: Path, *, folder: bool = False, replace: bool = False) -> Iterator[Path]:
    """Yield a path beside `target` to write to; at the end it is renamed to `target`.

    A `target` that exists is refused, or with `replace`, if it is a file, replaced in one step. On
    any error, Ctrl-C too, all is as it was before; the next run removes what a killed one left.
    Raises UserError where nothing can be written, or the disk is full.
    """
    assert not (folder and replace), "a folder cannot take another's place in one step"
    target, beside = target.absolute(), _beside(target)
    try:
        _check_place(target, replace)
        _sweep(target)
        if folder:
            beside.mkdir()
        yield beside
        for path in [*(beside.rglob("*") if folder else ()), beside]:
            _fsync(path)
        _check_place(target, replace)  # something else may have written it just now
        beside.replace(target)
    except OSError as e:
        kept = "what was there stays" if os.path.lexists(target) else "nothing was left"
        raise UserError(f"cannot write {target}: {e.strerror or e}; {kept}") from None
    finally:
        _remove(beside)
    with suppress(OSError):  # it is there; only a power failure could still undo that
        _fsync(target.parent)


def write_atomically(path: Path, text: str) -> None:
    """Write or replace a text file: a reader sees the old text or the new, never half of one."""
    with atomic_path(path, replace=True) as beside:
        beside.write_text(text, encoding="utf-8")


def append_json(path: Path, row: Any) -> None:
    """Add a line of JSON to a file, through to the disk; UserError where that cannot be."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror or e}") from None


def _sweep(target: Path) -> None:
    """Remove what killed runs left beside this target, but nothing of a running process."""
    for stray in target.parent.glob(f".{glob.escape(target.name)}.part-*"):
        owner = stray.name.rpartition("-")[2]
        if owner.isdigit() and not _is_alive(int(owner)):
            _remove(stray)


def _remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if os.path.isdir(path) and not path.is_symlink():
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
