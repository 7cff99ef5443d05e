"""Training data by its format: a file of this folder each. Add formats here.

A format is one file with `open_dataset(path, images) -> Dataset`: random access to the examples of
a file, which is never held in memory as a whole.
"""

import codecs
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from ...checkpoints.command_line import either
from ...checkpoints.errors import UserError
from ...evaluation.questions.records import existing_file
from ..examples import Example

# From a name for --format to the file of this folder that reads it.
FORMATS = {"jsonl": "json_lines", "llava": "llava", "minimind": "minimind"}
SUFFIXES = (".jsonl", ".json", ".parquet")
SPLITS = ("train", "valid")
PARQUET = b"PAR1"


class Dataset(Protocol):
    """Examples by their number. Reading one raises UserError where it cannot be used.

    `blocks` are ranges of examples that are read together, in lists of such as are read one after
    another; None where each can be read alone.
    """

    @property
    def blocks(self) -> Sequence[Sequence[range]] | None: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Example: ...


def open_dataset(path: Path, format: str = "auto", images: Path | None = None) -> Dataset:
    """The examples of one file. Raises UserError for an unknown format or a file without any."""
    name = format_of(existing_file(path)) if format == "auto" else format
    if name not in FORMATS:
        raise UserError(f"no format is called {name!r}; there are auto, {', '.join(FORMATS)}")
    module = importlib.import_module(f".{FORMATS[name]}", __name__)
    dataset: Dataset = module.open_dataset(path, images)
    if not len(dataset):
        raise UserError(f"{path} holds no examples")
    return dataset


def format_of(path: Path) -> str:
    """What a file holds, by how it begins: a JSON list, JSON lines, or a parquet file.

    Raises UserError where it begins otherwise.
    """
    with path.open("rb") as file:
        head = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    if head.startswith(PARQUET) or path.suffix == ".parquet":
        return "minimind"
    if head.startswith(b"["):
        return "llava"
    if head.startswith(b"{"):
        return "jsonl"
    if not head:
        raise UserError(f"{path} holds no examples")
    raise UserError(
        f"the format of {path} is unknown; it must be JSON lines, LLaVA's JSON list or MiniMind-V's"
        f" parquet (format {either(FORMATS)})"
    )


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
        candidates = [path for suffix in SUFFIXES if (path := data / (split + suffix)).is_file()]
        if len(candidates) > 1:
            raise UserError(f"{data} holds {' and '.join(p.name for p in candidates)}; leave one")
        if candidates:
            files[split] = candidates[0]
    if "train" not in files:
        endings = either(f"train{suffix}" for suffix in SUFFIXES)
        raise UserError(f"{data} holds no {endings}")
    return files
