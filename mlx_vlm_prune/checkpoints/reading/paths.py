"""Which files of a folder are read: regular ones, and none that a system left beside them."""

import os
from pathlib import Path

from ..errors import UserError

POINTER = b"version https://git-lfs.github.com/spec/"
LARGEST_JSON = 1 << 24  # bytes of a model's JSON file
LARGEST_TOKENIZER = 1 << 27


def expand_home(path: str | Path) -> Path:
    """A path with the home folder in place of `~` or `~USER`. Raises UserError for no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"there is no home folder for {path}") from None


def find_files(folder: Path, *patterns: str) -> list[Path]:
    """What matches one of the patterns, sorted, but for hidden files: on foreign disks macOS
    writes a ._NAME beside every NAME."""
    paths = {path for pattern in patterns for path in folder.glob(pattern)}
    return sorted(path for path in paths if not path.name.startswith("."))


def check_regular(path: Path, most: int | None = None) -> None:
    """UserError for a file that may never end (a pipe, a device), that has more than `most` bytes,
    or that only points at one in Git LFS."""
    if not path.exists():
        fault = "it is a link to nothing" if path.is_symlink() else "there is no such file"
        raise UserError(f"cannot read {path}: {fault}")
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a file")
    if not path.is_file():
        raise UserError(f"{path} is not a regular file")
    size = path.stat().st_size
    if most is not None and size > most:
        raise UserError(f"{path} has {size} bytes; at most {most} are read")
    if size <= 1024 and _begins(path, POINTER):
        raise UserError(f"{path} is a pointer of Git LFS; fetch the file itself by `git lfs pull`")


def _begins(path: Path, start: bytes) -> bool:
    try:
        with path.open("rb") as opened:
            return opened.read(len(start)) == start
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror or e}") from None


def is_here(path: Path) -> bool:
    """Is there anything of this name? A pipe or a link to nothing is not taken for a file that is
    left out."""
    return os.path.lexists(path)
