"""Where what a model saw lies in the stored image, so that a box in an answer can be mapped back.

An affine map (a, b, c, d, e, f) takes the point (x, y) to (a x + b y + c, d x + e y + f), as in
Pillow. Points are measured in pixels from the upper left corner of a picture.
"""

from dataclasses import dataclass
from typing import Any

from PIL import Image

Affine = tuple[float, float, float, float, float, float]
Size = tuple[int, int]  # width and height

IDENTITY: Affine = (1, 0, 0, 0, 1, 0)
STORED = "mlx_vlm_prune.stored"  # in Image.info
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # what makes an image upright, by its EXIF orientation


@dataclass(frozen=True)
class StoredImage:
    """An image as it lies in its file: its size, and its EXIF orientation, 1 to 8. `opened` is the
    size of the upright picture that was made of it."""

    size: Size
    orientation: int
    opened: Size


def remember(image: Image.Image, size: Size, orientation: int) -> Image.Image:
    """The opened picture with a note of the image that it was made of, and no other."""
    image.info = {STORED: StoredImage(size, orientation, image.size)}
    return image


def stored_image(image: Image.Image) -> StoredImage:
    """The image that a picture was made of, by default itself."""
    note = image.info.get(STORED)
    if isinstance(note, StoredImage) and note.opened == image.size:
        return note
    return StoredImage(image.size, 1, image.size)


def compose(first: Affine, second: Affine) -> Affine:
    """The map that takes a point by `first`, then by `second`."""
    (a, b, c, d, e, f), (g, h, i, j, k, m) = first, second
    return (
        g * a + h * d, g * b + h * e, g * c + h * f + i,
        j * a + k * d, j * b + k * e, j * c + k * f + m,
    )  # fmt: skip


def scaling(before: Size, after: Size) -> Affine:
    """From a picture to the same at another size."""
    return (after[0] / before[0], 0, 0, 0, after[1] / before[1], 0)


def shift(x: float, y: float) -> Affine:
    return (1, 0, x, 0, 1, y)


def to_stored(image: Image.Image) -> Affine:
    """From an opened picture to the image in its file."""
    stored = stored_image(image)
    W, H = stored.size
    upright = (H, W) if stored.orientation > 4 else (W, H)
    turn: Affine = {
        1: IDENTITY,
        2: (-1, 0, W, 0, 1, 0),
        3: (-1, 0, W, 0, -1, H),
        4: (1, 0, 0, 0, -1, H),
        5: (0, 1, 0, 1, 0, 0),
        6: (0, 1, 0, -1, 0, H),
        7: (0, -1, W, -1, 0, H),
        8: (0, -1, W, 1, 0, 0),
    }[stored.orientation]  # fmt: skip
    return compose(scaling(image.size, upright), turn)


def placement(image: Image.Image, seen: Size, to_image: Affine | None) -> dict[str, Any]:
    """What --json has of an image; `to_image` goes from what the model saw to the opened picture.

    `size`: width and height in the file, `orientation` its EXIF orientation, `seen`: width and
    height of what the model saw, `to_original`: the affine map from there to the file's pixels,
    None where it is not known.
    """
    stored, affine = stored_image(image), None
    if to_image is not None:
        affine = [round(float(x), 6) + 0.0 for x in compose(to_image, to_stored(image))]
    return {
        "size": [*stored.size], "orientation": stored.orientation, "seen": [*seen],
        "to_original": affine,
    }  # fmt: skip
