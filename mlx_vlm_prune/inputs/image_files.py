"""Image files by name and by folder."""

import logging
import sys
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from ..checkpoints.errors import UserError
from .image import open_image

logger = logging.getLogger("mlx_vlm_prune")
ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"}


def find_images(paths: Iterable[str | Path]) -> tuple[list[Path], list[str]]:
    """The files named, and those of folders by name, each once; and what was left out.

    Every one is opened: a file that is named and cannot be read is a UserError, one in a folder is
    left out, with the reason. Raises UserError for a folder without images.
    """
    named: dict[Path, bool] = {}  # whether a folder brought it
    for path in map(Path, paths):
        path = path.expanduser()
        if path.is_dir():
            files = sorted(f for f in path.iterdir() if f.suffix.lower() in ENDINGS)
            if not files:
                raise UserError(f"there is no image in the folder {path}")
            named |= {file: True for file in files if file not in named}
        else:
            named[path] = False
    readable, skipped = [], []
    for path, is_of_folder in tqdm(named.items(), "images", file=sys.stderr, leave=False, delay=2):
        try:
            open_image(path)
            readable.append(path)
        except UserError as problem:
            if not is_of_folder:
                raise
            skipped.append(str(problem))
    if not readable:
        raise UserError(f"no image can be read: {skipped[0]}")
    return readable, skipped
