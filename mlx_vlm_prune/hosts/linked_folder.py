"""A folder of a model of mlx-vlm's written again: weights are linked, other files copied."""

import os
import shutil
from collections.abc import Collection
from pathlib import Path

from ..checkpoints.errors import UserError
from ..checkpoints.reading.files import optional_json

INDEX = "model.safetensors.index.json"


def weight_files(folder: Path) -> list[Path]:
    """The files that mlx-vlm reads the weights from: those that the index names, or else all.

    Raises UserError where there are none.
    """
    names = optional_json(folder / INDEX).get("weight_map")
    named = {str(name) for name in names.values()} if isinstance(names, dict) else set()
    every = sorted(folder.glob("*.safetensors"))
    files = [file for file in every if file.name in named]
    files = files or [file for file in every if not file.name.endswith("consolidated.safetensors")]
    if not files:
        raise UserError(f"{folder} holds no .safetensors, and mlx-vlm reads no other weights")
    return files


def link_or_copy(source: Path, folder: Path, without: Collection[str]) -> tuple[int, int]:
    """Link weights and copy other files, but for hidden ones and what `without` names at the top;
    the count of each.

    Other files are not linked, since an editor may change them in place, and so in both folders.
    """
    linked = copied = 0
    for file in sorted(source.rglob("*")):
        name = file.relative_to(source)
        if any(part.startswith(".") for part in name.parts) or not file.is_file():
            continue
        if name.parts[0] in without:
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".safetensors" and _link(file, folder / name):
            linked += 1
        else:
            shutil.copyfile(file, folder / name)
            copied += 1
    return linked, copied


def _link(file: Path, target: Path) -> bool:
    """Make a hard link, if the disk can; a file of the hub's cache is itself a link."""
    try:
        os.link(file.resolve(), target)
    except OSError:
        return False
    return True
