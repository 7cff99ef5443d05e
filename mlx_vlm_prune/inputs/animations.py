"""An animated GIF, WebP or PNG, frame by frame by Pillow, within limits of number and size."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby

from PIL import Image

from ..checkpoints.errors import UserError, reason
from .image import to_rgb

MOST_SOURCE_FRAMES = 100_000  # which are looked for one by one
MOST_SOURCE_PIXELS = 4_000_000_000  # of an animation's frames together, which are all decoded


@contextmanager
def naming_damage(name: str) -> Iterator[None]:
    """What a decoder raises of a file as UserError: of garbage that may be anything."""
    try:
        yield
    except UserError:
        raise
    except Exception as problem:
        raise UserError(f"{name} is truncated or damaged: {reason(problem)}") from problem


def count_frames(opened: Image.Image, name: str, most: int) -> int:
    """How many frames an animation has. Raises UserError for more or larger ones than allowed."""
    pixels, total = opened.width * opened.height, getattr(opened, "n_frames", 1)
    if pixels > most:
        raise UserError(
            f"{name} has more than the {most / 1e6:g} megapixels allowed; max_pixels allows more"
        )
    if not 1 < total <= MOST_SOURCE_FRAMES:
        raise UserError(
            f"{name} has {total} frame{'s' * (total != 1)}; a clip has 2 to {MOST_SOURCE_FRAMES}"
        )
    if total * pixels > MOST_SOURCE_PIXELS:
        raise UserError(
            f"{name} has {total} frames of {opened.width} x {opened.height} pixels; an animation"
            f" may have {MOST_SOURCE_PIXELS // 10**9} gigapixels"
        )
    return total


def frame_rate(
    opened: Image.Image, total: int, name: str, check: Callable[[], None] | None
) -> float:
    """Frames a second: as many in a second as the mean of what each stands for; 10 where the file
    does not say it, as browsers show it. Raises UserError for a frame that enlarges the others."""
    lasting_ms, size = 0.0, opened.size
    for number in range(total):
        if check:
            check()
        with naming_damage(name):
            opened.seek(number)
            if opened.size != size:
                (a, b), (c, d) = size, opened.size
                raise UserError(f"the frames of {name} must have one size; {a} x {b} and {c} x {d}")
            opened.load()  # WebP says how long a frame stands once it is decoded
            lasting_ms += float(opened.info.get("duration", 0) or 0)
    return 1000 * total / lasting_ms if math.isfinite(lasting_ms) and lasting_ms > 0 else 10.0


def decoded_frames(
    opened: Image.Image, numbers: Sequence[int], name: str, check: Callable[[], None] | None
) -> Iterator[Image.Image]:
    """These frames of an animation, in order; those in between are decoded on the way."""
    here = 0
    for number, same in groupby(numbers):
        for step in range(here, number + 1):
            if check:
                check()
            with naming_damage(name):
                opened.seek(step)
                opened.load()
        with naming_damage(name):
            frame = to_rgb(opened.copy(), name)
        here = number + 1
        yield from (frame for _ in same)
