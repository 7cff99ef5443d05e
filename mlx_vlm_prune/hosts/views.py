"""Views: the tower's output for an image, or for one tile of it; which view is of which image.

Shapes: T pictures (images or tiles), N visual tokens of one, D features.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod

import mlx.core as mx
import numpy as np

from ..checkpoints.errors import UserError
from ..pruners.contract import Reduction, Signals
from .prepared_inputs import PreparedInputs


@dataclass(frozen=True)
class View:
    """The tower's output for an image: all of it, or one crop."""

    image: int  # index of the image in the prompt
    signals: Signals  # of one picture
    pixels_HW3: mx.array | None = None  # the tower's input; None: the whole picture
    deepstack: tuple[mx.array, ...] = ()  # (1, N, D) each, added behind the first layers
    breaks: int = 0  # placeholders that are no visual token; they stand behind as many equal parts
    kept: Reduction | None = None  # what is left of the picture where tokens left inside the tower

    @property
    def N(self) -> int:
        """Visual tokens of the whole picture."""
        return prod(self.signals.grid)

    @property
    def is_token(self) -> np.ndarray:
        """Which of its placeholders are visual tokens."""
        if not self.breaks:
            return np.ones(self.N, bool)
        return np.tile(np.arange(self.N // self.breaks + 1) < self.N // self.breaks, self.breaks)

    @property
    def arrays(self) -> list[mx.array]:
        """All arrays."""
        pixels = () if self.pixels_HW3 is None else (self.pixels_HW3,)
        kept = self.kept.arrays if self.kept else []
        return [*self.signals.arrays.values(), *self.deepstack, *pixels, *kept]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays)


def make_views(inputs: PreparedInputs, signals: Signals, pixels_THW3: mx.array) -> list[View]:
    """A view of each of T pictures.

    Raises UserError where it is not known which pictures are of which image.
    """
    tiles, T = inputs.extra.get("num_patches_list"), len(pixels_THW3)
    if tiles is None:
        tiles = [T] if inputs.images == 1 else [1] * inputs.images
    if sum(tiles) != T:
        raise UserError(f"{inputs.images} images became {T} pictures: give one image")
    return assign_images([View(0, signals.of_image(i), pixels_THW3[i]) for i in range(T)], tiles)


def count_tiles(ids: Sequence[int], placeholder: int, global_image: int) -> list[int]:
    """How many tiles each image of an Idefics3 prompt has.

    A tile is a run of placeholders. The run behind the token `global_image` shows the whole image
    and is its last tile.
    """
    counts = [0]
    for previous, token in pairwise([-1, *ids]):
        if token == placeholder and previous != placeholder:
            counts[-1] += 1
            counts += [0] if previous == global_image else []
    return [n for n in counts if n]


def assign_images(views: Sequence[View], tiles: Sequence[int]) -> list[View]:
    """The views with the index of their image; `tiles` is how many views each image has.

    Raises UserError where prompt and tiles do not fit.
    """
    images = [image for image, n in enumerate(tiles) for _ in range(n)]
    if len(images) != len(views):
        raise UserError(
            f"the prompt has room for {len(images)} tiles and the images have {len(views)}"
        )
    return [replace(view, image=image) for view, image in zip(views, images, strict=True)]
