"""The images of a sweep: files, and those of folders that can be read."""

import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from ..checkpoints.errors import UserError
from ..checkpoints.reading.paths import expand_home
from ..inputs.image import MAX_PIXELS, open_image
from .labelled_images import find_images


def readable_images(
    paths: Sequence[str | Path], max_pixels: int = MAX_PIXELS
) -> tuple[list[Path], list[str]]:
    """The files named, and those of folders, each once; and what was left out, with the reason.

    Every one is opened. Raises UserError for a file that is named and cannot be read, and for a
    folder without images.
    """
    is_named: dict[Path, bool] = {}
    for source in map(expand_home, paths):
        for image in find_images([source]):
            is_named[image.path] = is_named.get(image.path, False) or not source.is_dir()
    readable, skipped = [], []
    for path in tqdm(is_named, "images", file=sys.stderr, leave=False, delay=2):
        try:
            open_image(path, max_pixels)
            readable.append(path)
        except UserError as problem:
            if is_named[path]:
                raise
            skipped.append(str(problem))
    if not readable:
        raise UserError(f"no image can be read: {skipped[0]}")
    return readable, skipped
