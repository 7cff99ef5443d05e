"""Training data by its format: a file of this folder each. Add formats here.

A format is one file with `open_dataset(path, images) -> Dataset`: random access to the examples of
a file, which is never held in memory as a whole.
"""

import importlib
from pathlib import Path
from typing import Protocol

from ...checkpoints.command_line import either
from ...checkpoints.errors import UserError
from ..examples import Example

# From a name for --format to the file of this folder that reads it, and the endings it takes.
FORMATS = {"jsonl": "json_lines"}
SUFFIXES = {".jsonl": "jsonl"}
SPLITS = ("train", "valid")


class Dataset(Protocol):
    """Examples by their number. Reading one raises UserError where it cannot be used."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Example: ...


def open_dataset(path: Path, format: str = "auto", images: Path | None = None) -> Dataset:
    """The examples of one file. Raises UserError for an unknown format or a file without any."""
    name = SUFFIXES.get(path.suffix, "") if format == "auto" else format
    if name not in FORMATS:
        raise UserError(
            f"the format of {path} is unknown; give format {either(FORMATS)}, or a file that ends"
            f" in {either(SUFFIXES)}"
        )
    module = importlib.import_module(f".{FORMATS[name]}", __name__)
    dataset: Dataset = module.open_dataset(path, images)
    if not len(dataset):
        raise UserError(f"{path} holds no examples")
    return dataset


def split_files(data: Path) -> dict[str, Path]:
    """The file to train on, and that of held-out examples where `data` is a folder with one.

    Raises UserError where there is nothing to train on, or several files of a split.
    """
    if data.is_file():
        return {"train": data}
    if not data.is_dir():
        raise UserError(f"there is no file or folder {data}")
    files = dict[str, Path]()
    for split in SPLITS:
        candidates = sorted(p for p in data.glob(f"{split}.*") if p.suffix in SUFFIXES)
        if len(candidates) > 1:
            raise UserError(f"{data} holds {' and '.join(p.name for p in candidates)}; leave one")
        if candidates:
            files[split] = candidates[0]
    if "train" not in files:
        endings = either(f"train{suffix}" for suffix in SUFFIXES)
        raise UserError(f"{data} holds no {endings}")
    return files
