"""From an opened image to what the vision tower reads, and where that lies in the image.

The preprocessing is that of Hugging Face's CLIPImageProcessor (the one built on Pillow), value for
value.

Shapes: H height, W width, 3 channels, last.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..checkpoints.errors import UserError
from ..checkpoints.processor import PREPROCESSOR_CONFIG
from ..checkpoints.reading.fields import Fields
from ..checkpoints.reading.files import read_json
from .image import MAX_PIXELS, to_rgb
from .placement import Affine, Size, compose, placement, scaling, shift

MAX_SIDE = 4096  # of what a tower may ask for
FILTERS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)  # 2 and 3 in the JSON


@dataclass(frozen=True)
class Preprocessor:
    """From a picture to what the tower reads; the defaults are CLIP's.

    `size`: the shortest side in pixels, or (height, width). `crop`: (height, width) of the
    middle, black where the picture is smaller. `rescale`: the factor to [0, 1]. `mean` and
    `std`: per channel, after it. None skips a step.
    """

    size: int | tuple[int, int] | None = 224
    crop: tuple[int, int] | None = (224, 224)
    rescale: float | None = 1 / 255
    mean: tuple[float, float, float] | None = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    resample: Image.Resampling = Image.Resampling.BICUBIC
    pad: bool = False  # first made square, the picture in the middle, `mean` around it: LLaVA's

    @classmethod
    def from_folder(
        cls, path: str | os.PathLike[str], usual: "Preprocessor | None" = None
    ) -> "Preprocessor":
        """Read preprocessor_config.json in Hugging Face's CLIP or SigLIP format.

        What the file leaves open is as in `usual`, by default CLIP's. Raises UserError that
        names the file and the field.
        """
        usual = usual or cls()
        file = Path(path) / PREPROCESSOR_CONFIG
        fields = _Fields(read_json(file), file)
        normalise = fields.flag("do_normalize")
        crops = fields.flag("do_center_crop", usual.crop is not None)
        rescales = fields.flag("do_rescale")
        return cls(
            size=fields.size(usual.size) if fields.flag("do_resize") else None,
            crop=fields.crop() if crops else None,
            rescale=fields.positive("rescale_factor", 1 / 255) if rescales else None,
            mean=fields.channels("image_mean", usual.mean) if normalise else None,
            std=fields.channels("image_std", usual.std) if normalise else cls.std,
            resample=fields.filter(usual.resample),
            pad=fields.flag("do_pad", False),
        )

    def __call__(self, image: Image.Image) -> np.ndarray:
        """What the tower reads of an image that `open_image` opened: (H, W, 3) float32.

        Equal to CLIPImageProcessor's `pixel_values` but for the order of the axes.
        Raises UserError for a picture too thin to resize without a crop.
        """
        return self.values(self.visible(image))

    def values(self, visible: Image.Image) -> np.ndarray:
        """The same of the part that the tower sees, as `visible` gives it."""
        pixels_HW3 = np.asarray(visible)
        pairs = zip(self._levels(), np.moveaxis(pixels_HW3, -1, 0), strict=True)
        return np.stack([levels.take(pixels, mode="clip") for levels, pixels in pairs], axis=-1)

    def _levels(self) -> np.ndarray:
        """Each grey level's value in each channel: (3, 256) float32."""
        grey = np.arange(256)
        # Rescaled in float64 and then rounded, as Hugging Face does.
        scaled = (grey if self.rescale is None else grey * self.rescale).astype(np.float32)
        if self.mean is None:
            return np.broadcast_to(scaled, (3, 256))
        mean, std = (np.array(v, dtype=np.float32)[:, None] for v in (self.mean, self.std))
        return np.asarray((scaled - mean) / std)

    def visible(self, image: Image.Image) -> Image.Image:
        """The part of the picture the tower sees, resized and cropped, as RGB."""
        image = image if image.mode == "RGB" else to_rgb(image, "the image")
        image = self._square(image) if self.pad else image
        width, height = self._resized(image.size)
        if width * height > MAX_PIXELS:
            return self._visible_of_sliver(image, width, height)
        if (width, height) != image.size:
            image = image.resize((width, height), self.resample)
        if self.crop is None:
            return image
        box = self._crop_box(width, height)
        return image.crop(box)  # Pillow, too, pads with black

    def placement(self, image: Image.Image) -> dict[str, Any]:
        """Where what the tower sees lies in the image's file: see `placement`."""
        seen, to_image = self.to_image(image.size)
        return placement(image, seen, to_image)

    def to_image(self, size: Size) -> tuple[Size, Affine]:
        """Width and height of what the tower sees of a picture, and the map from there to it."""
        side = max(size)
        whole = (side, side) if self.pad else size
        left, top = (side - size[0]) // 2, (side - size[1]) // 2
        resized = self._resized(whole)
        box = self._crop_box(*resized) if self.crop else (0, 0, *resized)
        to_image = compose(shift(box[0], box[1]), scaling(resized, whole))
        to_image = compose(to_image, shift(-left, -top)) if self.pad else to_image
        return (box[2] - box[0], box[3] - box[1]), to_image

    def _square(self, image: Image.Image) -> Image.Image:
        side = max(image.size)
        if side**2 > 4 * MAX_PIXELS:
            raise UserError(
                f"an image of {image.width} x {image.height} pixels is too long to be made square"
            )
        red, green, blue = (int(255 * x) for x in self.mean or (0, 0, 0))
        canvas = Image.new("RGB", (side, side), (red, green, blue))
        canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return canvas

    def _resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """Width and height after resizing: the shorter side to `size`, the other rounded down."""
        width, height = size
        if self.size is None:
            return width, height
        if isinstance(self.size, tuple):
            return self.size[1], self.size[0]
        if width <= height:
            return self.size, int(self.size * height / width)
        return int(self.size * width / height), self.size

    def _crop_box(self, width: int, height: int) -> tuple[int, int, int, int]:
        assert self.crop is not None
        rows, columns = self.crop
        left, top = (width - columns) // 2, (height - rows) // 2
        return left, top, left + columns, top + rows

    def _visible_of_sliver(self, image: Image.Image, width: int, height: int) -> Image.Image:
        """Resize only what the crop keeps: a 1 x 10,000 picture would otherwise take 1.5 GB.

        Rounding of the box may move a value by one grey level.
        """
        if self.crop is None:
            raise UserError(
                f"an image of {image.width} x {image.height} pixels would be resized to "
                f"{width} x {height}, more than {MAX_PIXELS // 10**6} megapixels; crop it first"
            )
        left, top, right, bottom = self._crop_box(width, height)
        x0, y0, x1, y1 = max(left, 0), max(top, 0), min(right, width), min(bottom, height)
        across, down = image.width / width, image.height / height
        seen = (x0 * across, y0 * down, x1 * across, y1 * down)
        # A sliver is always enlarged, so the filter reaches two pixels beyond the box. Cut there
        # first: of a long picture Pillow may filter columns before rows, and round otherwise.
        near_x, near_y = max(int(seen[0]) - 3, 0), max(int(seen[1]) - 3, 0)
        end_x, end_y = min(int(seen[2]) + 4, image.width), min(int(seen[3]) + 4, image.height)
        near = image.crop((near_x, near_y, end_x, end_y))
        box = (seen[0] - near_x, seen[1] - near_y, seen[2] - near_x, seen[3] - near_y)
        canvas = Image.new("RGB", (right - left, bottom - top))
        part = near.resize((x1 - x0, y1 - y0), self.resample, box=box)
        canvas.paste(part, (x0 - left, y0 - top))
        return canvas


def siglip_preprocessor(side: int) -> Preprocessor:
    """What SigLIP's towers read: the whole picture made square, values from -1 to 1."""
    half = (0.5, 0.5, 0.5)
    size = (side, side)
    return Preprocessor(size, None, mean=half, std=half, resample=Image.Resampling.BILINEAR)


class _Fields(Fields):
    """The fields of a preprocessor_config.json."""

    def flag(self, field: str, default: bool | None = True) -> bool:
        if default is not None and self.get(field) is None:  # null is the default, too
            return default
        return super().flag(field, default)

    def size(self, default: int | tuple[int, int] | None) -> int | tuple[int, int] | None:
        value = self.get("size")
        if value is None:
            return default
        if isinstance(value, dict) and set(value) == {"shortest_edge"}:
            value = value["shortest_edge"]
        if _is_side(value):
            return int(value)
        return self._height_width("size", value, 'an integer, {"shortest_edge": n} or ')

    def crop(self) -> tuple[int, int]:
        value = self.values.get("crop_size", 224)
        if _is_side(value):
            return value, value
        return self._height_width("crop_size", value, "an integer or ")

    def _height_width(self, field: str, value: Any, others: str) -> tuple[int, int]:
        if isinstance(value, dict) and set(value) == {"height", "width"}:
            height, width = value["height"], value["width"]
            if _is_side(height) and _is_side(width):
                return height, width
        raise self.error(field, f'{others}{{"height": n, "width": n}}, n from 1 to {MAX_SIDE}')

    def channels(self, field: str, default: Any) -> tuple[float, float, float]:
        value = self.values.get(field, default)
        smallest = 1e-6 if field == "image_std" else -math.inf  # std divides
        fine = isinstance(value, list | tuple) and len(value) == 3 and all(map(_is_finite, value))
        if not fine or min(value) < smallest:
            kind = "positive" if field == "image_std" else "finite"
            raise self.error(field, f"three {kind} numbers")
        red, green, blue = map(float, value)
        return red, green, blue

    def filter(self, default: Image.Resampling) -> Image.Resampling:
        value = self.values.get("resample", default)
        if isinstance(value, bool) or value not in list(FILTERS):
            raise self.error("resample", "2 (bilinear) or 3 (bicubic)")
        return Image.Resampling(value)


def _is_side(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MAX_SIDE


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e6
