"""What is asked of a model: a prompt, images, and how to answer."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from PIL import Image

from ..checkpoints.errors import UserError
from ..pruners import Pipeline, Pruner
from ..pruners.contract import Policy

ImageSource = str | Path | bytes | Image.Image


@dataclass(frozen=True)
class Request:
    """The arguments of `stream_generate`, as given. Raises UserError for what no model can do."""

    prompt: str
    images: Sequence[ImageSource]
    pruner: str | Pruner | Pipeline
    keep_ratio: float | None
    keep_tokens: int | None
    positions: Policy | None
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    template: Mapping[str, Any] | None
    prefill_step_size: int | None
    kv_bits: float | None
    quantized_kv_start: int | None
    resize_shape: Sequence[int] | None
    num_draft_tokens: int | None

    def __post_init__(self) -> None:
        if self.positions not in (None, "keep", "renumber"):
            raise UserError(f"positions is {self.positions!r}; it is keep or renumber")
        check_decoding(self.max_tokens, self.temperature, self.top_p, self.seed)

    @property
    def is_for_mlx_vlm(self) -> bool:
        """Is there an option that only mlx-vlm's models have?"""
        cache = (self.prefill_step_size, self.kv_bits, self.quantized_kv_start)
        return any(x is not None for x in (*cache, self.resize_shape))


def check_decoding(max_tokens: int, temperature: float, top_p: float, seed: int) -> None:
    """Say early how an answer cannot be decoded. Raises UserError."""
    if not (isinstance(max_tokens, Integral) and max_tokens >= 1):
        raise UserError(f"max_tokens is {max_tokens!r}; it must be at least 1, a whole number")
    if not (isinstance(temperature, Real) and 0 <= temperature < float("inf")):
        raise UserError(f"temperature is {temperature!r}; it must be 0 or more")
    if not (isinstance(top_p, Real) and 0 < top_p <= 1):
        raise UserError(f"top_p is {top_p!r}; it must be above 0 and at most 1")
    if not (isinstance(seed, Integral) and 0 <= seed < 2**63):
        raise UserError(f"seed is {seed!r}; it must be at least 0 and below 2**63")


def listed_images(image: ImageSource | Sequence[ImageSource] | None) -> list[ImageSource]:
    """One image, several or none as a list. Raises UserError for what is no image's source."""
    if image is None:
        return []
    images: Any = image
    if isinstance(images, ImageSource) or not isinstance(images, Iterable):
        images = [images]
    images = list(images)  # of an iterator, which can be read once
    for one in images:
        if not isinstance(one, ImageSource | os.PathLike):
            raise UserError(f"an image is {one!r}; give a path, a file's bytes or a Pillow image")
    return images
