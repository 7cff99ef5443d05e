"""Open an untrusted image, and make of it what the vision tower sees.

A file is judged by its header before a pixel is decoded, only plain raster formats
are tried, and whatever a decoder throws becomes one sentence. The preprocessing is
that of Hugging Face's CLIPImageProcessor (the one built on Pillow), value for value.

Shapes: H height, W width, 3 channels, last.
"""

import io
import math
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import (
    Image,
    ImageOps,
    UnidentifiedImageError,
    WebPImagePlugin,  # noqa: F401  (else Pillow imports all its readers to find WEBP's)
)

from ..checkpoints.errors import UserError
from ..checkpoints.processor import PREPROCESSOR_CONFIG
from ..checkpoints.reading.fields import Fields
from ..checkpoints.reading.files import read_json
from .image_sources import ImageSource, file_bytes, source_name

# Formats whose readers neither start a program nor follow a reference. TIFF, EPS, PSD,
# ICO and the rest are left out: each is one more parser to attack, and no photograph needs it.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 25_000_000  # 75 MB as RGB; every phone's default photograph is smaller
MAX_SIDE = 4096  # of what a tower may ask for
WHITE = (255, 255, 255, 255)
FILTERS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)  # 2 and 3 in the JSON


def open_image(source: ImageSource) -> Image.Image:
    """An image from one of KINDS_OF_SOURCE, upright and as RGB.

    An open file is read from its beginning, if it has one, and stands afterwards where it stood.

    Of an animation, the first frame. EXIF rotation is applied, transparency is laid on
    white (as transformers does since 5.21), 16-bit grey is scaled to 8 bits.

    A phone's JPEG opens two to four times as fast where Pillow decodes it at a fraction of its
    size. This is not the default: pixels then are a few grey levels off transformers':

        photo = Image.open(path)
        photo.draft("RGB", (1008, 1008))  # at least three times the sides the tower reads

    Raises UserError, one sentence that names the path: no such file, a directory, an
    empty file, not one of FORMATS, truncated or damaged, more than MAX_PIXELS, a URL.
    """
    name = source_name(source)
    try:
        with warnings.catch_warnings():  # what Pillow warns of is read; its size is checked here
            warnings.filterwarnings("ignore", module="PIL")
            return _decode(source, name)
    except UserError:
        raise
    except Image.DecompressionBombError:
        raise _too_large(name) from None
    except UnidentifiedImageError:
        allowed = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        raise UserError(f"{name} is not a {allowed} image") from None
    except Exception as problem:  # a decoder that is fed garbage may raise anything
        raise UserError(f"{name} is truncated or damaged: {problem}") from problem


def _decode(source: ImageSource, name: str) -> Image.Image:
    if isinstance(source, np.ndarray):
        return _from_array(source, name)
    if isinstance(source, Image.Image):
        _check_size(source, name)
        return _rgb(ImageOps.exif_transpose(source), name)  # of a copy
    data = file_bytes(source, name)
    if not data:
        raise UserError(f"{name} is empty (0 bytes)")
    with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
        _check_size(opened, name)  # nothing is decoded yet
        ImageOps.exif_transpose(opened, in_place=True)
        return _rgb(opened, name)


def _from_array(pixels: np.ndarray, name: str) -> Image.Image:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise UserError(
            f"{name} is a numpy array {pixels.shape} of {pixels.dtype}; give (H, W, 3) of uint8"
        )
    height, width, _ = pixels.shape
    if not height * width:
        raise UserError(f"{name} has no pixels ({width} x {height})")
    if height * width > MAX_PIXELS:
        raise _too_large(name)
    return Image.fromarray(pixels)


def _too_large(name: str) -> UserError:
    return UserError(f"{name} has more than the {MAX_PIXELS // 10**6} megapixels allowed")


def _check_size(image: Image.Image, name: str) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise _too_large(name)
    if 0 in image.size:
        raise UserError(f"{name} has no pixels ({image.width} x {image.height})")


def _rgb(image: Image.Image, name: str) -> Image.Image:
    """As RGB; transparent pixels show white, not the colour stored beneath."""
    if image.mode == "F":
        raise UserError(f"{name} has floating-point pixels, whose range is unknown; use 8-bit ones")
    if image.mode.startswith("I"):  # Pillow's own conversion clips at 255: nearly all turns white
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = _in_mode(image, "RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            image = Image.alpha_composite(Image.new("RGBA", image.size, WHITE), image)
    return _in_mode(image, "RGB")


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    """Converted where need be; Pillow would copy an image that has the mode."""
    return image if image.mode == mode else image.convert(mode)


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
        image = image if image.mode == "RGB" else _rgb(image, "the image")
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
