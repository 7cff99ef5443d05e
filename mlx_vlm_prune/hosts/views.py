"""What passes between a host's model and its pruning.

Shapes: T pictures (images or tiles of them), N visual tokens of one, K kept of them, L rows of
the prompt, D features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import mlx.core as mx

from ..checkpoints.errors import UserError
from ..pruners.contract import Signals


@dataclass(frozen=True)
class Inputs:
    """What the model's own processor makes of a prompt and pictures."""

    ids: list[int]  # placeholders included
    mask_1L: mx.array
    pixels: Any = None  # laid out as the family's tower reads them; None without images
    images: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)  # such as image_grid_thw


@dataclass(frozen=True)
class View:
    """What the tower saw of an image: all of it, or one crop."""

    image: int  # whose
    signals: Signals  # of one picture
    pixels_HW3: mx.array | None = None  # as the tower read it; None: the whole picture
    deep: tuple[mx.array, ...] = ()  # (1, N, D) each, what DeepStack adds in the first layers


def per_picture(inputs: Inputs, signals: Signals, pixels_THW3: mx.array) -> list[View]:
    """A view for each of T pictures, with whose it is."""
    tiles, T = inputs.extra.get("num_patches_list"), len(pixels_THW3)
    if tiles is None:
        tiles = [T] if inputs.images == 1 else [1] * inputs.images
    if sum(tiles) != T:
        raise UserError(f"{inputs.images} images became {T} pictures: give one image")
    return by_image([View(0, signals.of_image(i), pixels_THW3[i]) for i in range(T)], tiles)


def tiles(ids: Sequence[int], placeholder: int, whole: int) -> list[int]:
    """How many tiles each image of an Idefics3 prompt was cut into: the last one's rows, which show
    all of the image, stand behind the token `whole`."""
    counts = [0]
    for before, token in pairwise([-1, *ids]):
        if token == placeholder and before != placeholder:
            counts[-1] += 1
            counts += [0] if before == whole else []
    return [n for n in counts if n]


def by_image(views: Sequence[View], counts: Sequence[int]) -> list[View]:
    """The views with their images, which have so many tiles each. Raises UserError where prompt
    and tiles do not fit."""
    images = [image for image, n in enumerate(counts) for _ in range(n)]
    if len(images) != len(views):
        raise UserError(
            f"the prompt has room for {len(images)} tiles and the images have {len(views)}"
        )
    return [replace(view, image=image) for view, image in zip(views, images, strict=True)]
