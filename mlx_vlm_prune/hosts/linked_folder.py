"""A folder of a model of mlx-vlm's: which weights are read, and the folder written again."""

import os
import shutil
from collections.abc import Collection
from pathlib import Path

from ..checkpoints.errors import UserError
from ..checkpoints.reading.files import optional_json, read_header
from ..checkpoints.reading.paths import find_files
from ..checkpoints.reading.weights import INDEX, read_folder, weight_files


def mlx_vlm_weight_files(folder: Path) -> list[Path]:
    """The files of the weights, as transformers selects them.

    mlx-vlm reads those that the index names, or else every .safetensors. Raises UserError where
    that would not be the same, and where there are none.
    """
    every = find_files(folder, "*.safetensors")
    if not every:
        raise UserError(f"{folder} holds no .safetensors, and mlx-vlm reads no other weights")
    files = weight_files(folder)
    if len(files) > 1 and all(file in every for file in files):
        read_folder(folder, lambda file: read_header(file)[0])  # each name once
    names = optional_json(folder / INDEX).get("weight_map")
    named = {str(name) for name in names.values()} if isinstance(names, dict) else set()
    read = [file for file in every if file.name in named]
    read = read or [file for file in every if not file.name.endswith("consolidated.safetensors")]
    if stray := [file.name for file in read if file not in files]:
        raise UserError(
            f"{folder}: mlx-vlm would read {stray[0]} too, and its tensors in place of those in"
            f" {files[0].name}; move it away"
        )
    if unread := [file.name for file in files if file not in read]:
        raise UserError(
            f"{folder}: mlx-vlm would read what {INDEX} names, and not {unread[0]}; move the index"
            " away"
        )
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
