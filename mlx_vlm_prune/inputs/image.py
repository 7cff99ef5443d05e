"""Open an untrusted image: upright, as RGB, and no larger than memory allows.

A file is judged by its header and its blocks before a pixel is decoded, only plain raster formats
are tried, and whatever a decoder throws becomes one sentence.
"""

import ctypes
import io
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from threading import Lock
from typing import Any

import numpy as np
from PIL import (
    Image,
    UnidentifiedImageError,
    WebPImagePlugin,  # noqa: F401  (else Pillow imports all its readers to find WEBP's)
)

from ..checkpoints.errors import UserError, missing_package
from .exif import ORIENTATION, orientation, orientation_of
from .image_files import ImageFile, check_file
from .image_sources import ImageSource, file_bytes, most_bytes, source_name
from .placement import STORED, TURNS, Size, remember, stored_image

# Formats whose readers neither start a program nor follow a reference. EPS, PSD, ICO and the rest
# are left out: each is one more parser to attack, and no photograph needs it.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis")
LONGEST_BOX = 256  # bytes of brands that are looked at
MAX_PIXELS = 25_000_000  # 75 MB as RGB
MOST_PIXELS = 178_956_970  # Pillow opens no more
SCALES = (1, 2, 4, 8)  # at which a JPEG can be decoded
WHITE = (255, 255, 255, 255)


def open_image(source: ImageSource, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An image from one of KINDS_OF_SOURCE, upright and as RGB, of at most `max_pixels`.

    An open file is read from its beginning, if it has one, and stands afterwards where it stood.

    Of an animation, the first frame. EXIF rotation is applied, transparency is laid on
    white (as transformers does since 5.21), 16-bit grey is scaled to 8 bits. A JPEG with more
    pixels is decoded at a half, a quarter or an eighth of its size. `stored_image` tells the size
    and the orientation in the file.

    A smaller one opens two to four times as fast like this, too. It is not the default: pixels
    then are a few grey levels off transformers':

        photo = Image.open(path)
        photo.draft("RGB", (1008, 1008))  # at least three times the sides the tower reads

    Raises UserError, one sentence that names the path: no such file, a directory, an
    empty file, not one of FORMATS or HEIC, truncated or damaged, more than `max_pixels`, one that
    would take minutes, a URL.
    """
    name = source_name(source)
    try:
        with PILLOW_IS_QUIET:
            return _decode(source, name, max_pixels)
    except UserError:
        raise
    except Image.DecompressionBombError:
        raise _too_large(name, max_pixels) from None
    except UnidentifiedImageError:
        allowed = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        raise UserError(f"{name} is not a {allowed} image") from None
    except Exception as problem:  # a decoder that is fed garbage may raise anything
        raise UserError(f"{name} is truncated or damaged: {problem}") from problem


class _PillowIsQuiet:
    """What Pillow warns of is read, and a damaged file is one sentence: neither its warnings nor
    what libtiff prints are shown while any thread opens an image.

    `warnings.catch_warnings` alone is for one thread: of two, one would put back for good what the
    other had changed.
    """

    def __init__(self) -> None:
        self._lock, self._threads, self._undo = Lock(), 0, ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if not self._threads:
                self._undo.enter_context(warnings.catch_warnings())
                warnings.filterwarnings("ignore", module="PIL")
                self._undo.callback(_silence_libtiff())
            self._threads += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._threads -= 1
            if not self._threads:
                self._undo.close()


def _silence_libtiff() -> Callable[[], Any]:
    """Have Pillow's libtiff print no errors, until the function that is returned is called."""
    try:
        set_handler = ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler
    except (AttributeError, OSError):  # built without it, or in another way
        return lambda: None
    set_handler.restype, set_handler.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    before = set_handler(None)
    return lambda: set_handler(before)


PILLOW_IS_QUIET = _PillowIsQuiet()


def check_max_pixels(max_pixels: Any) -> None:
    """Raises UserError for what is no number of pixels that Pillow opens."""
    if type(max_pixels) is not int or not 1 <= max_pixels <= MOST_PIXELS:
        raise UserError(
            f"max_pixels is {max_pixels!r}; it must be a whole number from 1 to {MOST_PIXELS}"
        )


def _decode(source: ImageSource, name: str, most: int) -> Image.Image:
    if isinstance(source, np.ndarray):
        return _from_array(source, name, most)
    if isinstance(source, Image.Image):
        return _from_pillow(source, name, most)
    data = file_bytes(source, name, most_bytes(most))
    if not data:
        raise UserError(f"{name} is empty (0 bytes)")
    if is_heic(data):
        return _from_heic(data, name, most)
    file = check_file(data, name, most)
    is_tiff = data.startswith((b"II", b"MM"))
    if is_tiff:
        from PIL import TiffImagePlugin  # noqa: F401  (see WebP's)
    formats = [name for name in FORMATS if (name == "TIFF") == is_tiff]
    with Image.open(io.BytesIO(file.data), formats=formats) as opened:
        size = opened.size
        _fit(opened, file, name, most)  # nothing is decoded yet
        opened.load()
        if opened.format == "TIFF":  # which is upright when it is loaded
            turn = orientation_of({"exif": data})
            left = opened.getexif().get(ORIENTATION, 1)
            size = opened.size[::-1] if (turn > 4) != (left > 4) else opened.size
        else:
            turn = left = (
                orientation(file.exif, file.xmp) if file.scans else orientation_of(opened.info)
            )
        return remember(to_rgb(_upright(opened, left), name), size, turn)


def _from_pillow(image: Image.Image, name: str, most: int) -> Image.Image:
    """A copy of what the user opened."""
    _check_size(image.size, name, most)
    image.load()
    stored, turn = stored_image(image), orientation_of(image.info)
    upright = to_rgb(_upright(image, turn), name)
    upright = upright.copy() if upright is image else upright
    if STORED in image.info and turn == 1:
        return remember(upright, stored.size, stored.orientation)
    return remember(upright, image.size, turn)


def is_heic(data: bytes) -> bool:
    """Is it a HEIC file, by the brands in its first box? A phone may name HEIC's behind `mif1`, an
    image, or `msf1`, a sequence."""
    if data[4:8] != b"ftyp":
        return False
    brands = data[8 : min(int.from_bytes(data[:4], "big"), LONGEST_BOX)]
    return any(brands[at : at + 4] in HEIC_BRANDS for at in range(0, len(brands), 4))


def _from_heic(data: bytes, name: str, most: int) -> Image.Image:
    """By pillow-heif, which gives an upright picture and no smaller one: all of it is held, and one
    that is too large is made smaller afterwards."""
    try:
        import pillow_heif
    except ImportError:
        raise missing_package("pillow_heif", name) from None
    opened = pillow_heif.open_heif(io.BytesIO(data))
    width, height = opened.size
    if width * height > 2 * most:
        raise UserError(f"{name} is a HEIC file, of which all is held: it has {_limit(2 * most)}")
    picture = to_rgb(opened.to_pillow(), name)
    if width * height > most:
        picture = picture.reduce(2)
    _check_size(picture.size, name, most)
    return remember(picture, opened.size, 1)


def _upright(image: Image.Image, turn: int) -> Image.Image:
    return image.transpose(TURNS[turn]) if turn in TURNS else image


def _fit(opened: Image.Image, file: ImageFile, name: str, most: int) -> None:
    """Have a large JPEG decoded at a fraction of its size. Raises UserError for other large
    images, and for a JPEG whose coefficients must all be held."""
    width, height = opened.size
    is_jpeg = opened.format in ("JPEG", "MPO")
    scale = next((n for n in SCALES if -(-width // n) * -(-height // n) <= most), None)
    if file.is_progressive and width * height > 2 * most:
        raise UserError(
            f"{name} is a progressive JPEG, of which all is held: it has {_limit(2 * most)}"
        )
    if scale is None or (scale > 1 and not is_jpeg):
        raise _too_large(name, most)
    if scale > 1:
        opened.draft(None, (max(width // scale, 1), max(height // scale, 1)))
    _check_size(opened.size, name, most)


def _from_array(pixels: np.ndarray, name: str, most: int) -> Image.Image:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise UserError(
            f"{name} is a numpy array {pixels.shape} of {pixels.dtype}; give (H, W, 3) of uint8"
        )
    _check_size((pixels.shape[1], pixels.shape[0]), name, most)
    return Image.fromarray(pixels)


def _limit(most: int) -> str:
    return f"more than the {most / 1e6:g} megapixels allowed; max_pixels allows more"


def _too_large(name: str, most: int) -> UserError:
    return UserError(f"{name} has {_limit(most)}")


def _check_size(size: Size, name: str, most: int) -> None:
    width, height = size
    if width * height > most:
        raise _too_large(name, most)
    if 0 in size:
        raise UserError(f"{name} has no pixels ({width} x {height})")


def to_rgb(image: Image.Image, name: str) -> Image.Image:
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
