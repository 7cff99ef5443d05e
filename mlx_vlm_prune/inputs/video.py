"""A clip: a folder of pictures, an animation or a video file, as frames with their times.

A folder's pictures are frames in the order of their names. Pillow reads animations (GIF, WebP,
PNG), OpenCV, which mlx-vlm brings, video files. Frames are taken by mlx-vlm's own rule.
"""

import io
import logging
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..checkpoints.errors import UserError, missing_package, reason, short
from .image import MAX_PIXELS, PILLOW_IS_QUIET, open_image, to_rgb
from .image_files import check_file
from .image_sources import (
    DATA_URI,
    ImageSource,
    NamedBytes,
    file_bytes,
    is_source,
    most_bytes,
)

logger = logging.getLogger("mlx_vlm_prune")
DEFAULT_FPS, DEFAULT_MAX_FRAMES = 2.0, 32
MOST_FPS, MOST_FRAMES = 1000, 768  # mlx-vlm takes no more frames by itself
FEWEST_FRAMES = 4  # of a file, where it has as many
MOST_SOURCE_FRAMES = 100_000  # of an animation, which are looked for one by one
MOST_SOURCE_PIXELS = 4_000_000_000  # of these frames together, which are all decoded
MOST_IMAGES_IN_MEMORY = 16  # of the largest size, of all frames together
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".heic")
ANIMATIONS = {b"GIF8": "GIF", b"\x89PNG": "PNG", b"RIFF": "WEBP"}  # by the first four bytes
MATROSKA, MP4 = b"\x1a\x45\xdf\xa3", b"ftyp"
KINDS_OF_VIDEO = (
    "an MP4, MOV, MKV, WebM or AVI file, an animated GIF, WebP or PNG, or a folder of pictures"
)


@dataclass(frozen=True)
class Clip:
    """Frames of one size, in order.

    `numbers` are theirs among the `total` frames of the source, of which there are `fps` a second.
    """

    frames: list[Image.Image]
    numbers: list[int]
    total: int
    fps: float

    @property
    def seconds(self) -> list[float]:
        """When each frame is seen."""
        return [number / self.fps for number in self.numbers]

    def resized(self, shape: tuple[int, int] | None) -> "Clip":
        """The same, made to fit this width and height where they are given."""
        if shape is None:
            return self
        width, height = self.frames[0].size
        ratio = min(shape[0] / width, shape[1] / height)
        size = max(1, int(width * ratio)), max(1, int(height * ratio))
        return Clip([f.resize(size) for f in self.frames], self.numbers, self.total, self.fps)


@dataclass(frozen=True)
class FrameLimits:
    """Of a clip: frames a second, the most frames, the most pixels of one, and what each is turned
    into as soon as it is decoded."""

    fps: float
    max_frames: int
    max_pixels: int
    fit: Callable[[Image.Image], Image.Image] | None = None


VideoSource = str | os.PathLike[str] | bytes | Sequence[ImageSource] | Clip


def check_frame_options(fps: Any, max_frames: Any) -> None:
    """Raises UserError for what is no rate or no number of frames."""
    is_rate = isinstance(fps, int | float) and not isinstance(fps, bool) and 0 < fps <= MOST_FPS
    if not is_rate:
        raise UserError(f"fps is {short(fps)}; it must be above 0 and at most {MOST_FPS}")
    if type(max_frames) is not int or not 1 <= max_frames <= MOST_FRAMES:
        raise UserError(
            f"max_frames is {short(max_frames)}; it must be a whole number from 1 to {MOST_FRAMES}"
        )


def check_source(video: Any) -> None:
    """Raises UserError for what is no path, no bytes and no list of frames."""
    is_list = isinstance(video, Sequence) and not isinstance(video, bytearray)
    if isinstance(video, str | os.PathLike | bytes | Clip):
        return
    if not (is_list and all(map(is_source, video))):
        raise UserError(
            f"video is {short(video)}; give {KINDS_OF_VIDEO}, a file's bytes, a data URI, or a list"
            " of frames"
        )


def open_video(
    source: VideoSource, fps: float = DEFAULT_FPS, max_frames: int = DEFAULT_MAX_FRAMES,
    max_pixels: int = MAX_PIXELS, fit: Callable[[Image.Image], Image.Image] | None = None,
) -> Clip:  # fmt: skip
    """At most `max_frames` frames of a clip, each of at most `max_pixels`; a Clip as it is.

    `source` is a path, a data URI, a file's bytes or a list of pictures. `fit` makes another
    picture of each frame, for example a smaller one.

    Of a file `fps` frames a second are taken. The pictures of a folder or a list are all taken, as
    `fps` a second. Where that is more than `max_frames`, these are spread evenly.

    Raises UserError, one sentence that names the path: no such file, nothing that can be read,
    frames of several sizes, too many pixels.
    """
    if isinstance(source, Clip):
        return source
    limits = FrameLimits(fps, max_frames, max_pixels, fit)
    if isinstance(source, str) and source[: len(DATA_URI)].lower() == DATA_URI:
        content = file_bytes(DATA_URI + source[len(DATA_URI) :], "the data URI", 0)
        source = NamedBytes(content, "the data URI")
    if isinstance(source, bytes):
        name = source.name if isinstance(source, NamedBytes) else "the video"
        return _from_file(source, name, limits)
    if not isinstance(source, str | os.PathLike):
        return _from_pictures([*source], "the list of frames", limits)
    path = Path(source)
    if path.is_dir():
        names = sorted(p for p in path.iterdir() if p.suffix.lower() in PICTURES)
        return _from_pictures(names, str(path), limits)
    return _from_file(path, str(path), limits)


def frame_numbers(total: int, source_fps: float, fps: float, max_frames: int) -> list[int]:
    """Which of so many frames are taken: an even number that makes `fps` a second, spread evenly
    from the first to the last."""
    count = min(max(total / source_fps * fps, FEWEST_FRAMES), max_frames, total)
    return _spread(total, max(1, int(count) if count < 2 else int(count) // 2 * 2))


def _spread(total: int, count: int) -> list[int]:
    numbers: list[int] = np.linspace(0, total - 1, count).round().astype(int).tolist()
    return numbers


def _clip(
    frames: Iterator[Image.Image], numbers: list[int], total: int, fps: float, name: str,
    limits: FrameLimits,
) -> Clip:  # fmt: skip
    """The clip of these frames. Raises UserError for several sizes, and more than memory holds."""
    taken, pixels, most = list[Image.Image](), 0, limits.max_pixels
    for frame in frames:
        frame = limits.fit(frame) if limits.fit else frame
        if taken and frame.size != taken[0].size:
            (a, b), (c, d) = taken[0].size, frame.size
            raise UserError(f"the frames of {name} must have one size; {a} x {b} and {c} x {d}")
        pixels += frame.width * frame.height
        if pixels > MOST_IMAGES_IN_MEMORY * most:
            raise UserError(
                f"{len(numbers)} frames of {name} have more than the"
                f" {MOST_IMAGES_IN_MEMORY * most / 1e6:g} megapixels allowed; take fewer"
                " (max_frames)"
            )
        taken.append(frame)
    return Clip(taken, numbers[: len(taken)], total, float(fps))


def _from_pictures(sources: Sequence[Any], name: str, limits: FrameLimits) -> Clip:
    if not sources:
        raise UserError(f"{name} has no pictures ({', '.join(s[1:] for s in PICTURES)})")
    total = len(sources)
    numbers = _spread(total, min(total, limits.max_frames))
    frames = (open_image(sources[number], limits.max_pixels) for number in numbers)
    return _clip(frames, numbers, total, limits.fps, name, limits)


def _from_file(source: Path | bytes, name: str, limits: FrameLimits) -> Clip:
    """The clip of a file, by the kind that its first bytes say."""
    if isinstance(source, bytes):
        head = source[:12]
    else:
        try:
            with source.open("rb") as file:
                head = file.read(12)
        except OSError as problem:
            raise UserError(f"{name} cannot be read: {problem.strerror}") from None
    if head[:4] in ANIMATIONS and head[8:11] != b"AVI":
        return _from_animation(source, name, limits)
    if head[4:8] == MP4 or head[:4] == MATROSKA or head[8:11] == b"AVI":
        with _on_disk(source) as path:
            return _from_video(path, name, limits)
    raise UserError(f"{name} is not {KINDS_OF_VIDEO}")


@contextmanager
def _on_disk(source: Path | bytes) -> Iterator[Path]:
    """A file of these bytes until the end of the block, since OpenCV reads no others."""
    if isinstance(source, Path):
        yield source
        return
    with tempfile.TemporaryDirectory(prefix="mlx-vlm-prune-") as folder:
        path = Path(folder) / "video"
        path.write_bytes(source)
        yield path


def _from_animation(source: Path | bytes, name: str, limits: FrameLimits) -> Clip:
    """By Pillow. The frames of the source are taken as evenly spaced over its length."""
    most = limits.max_pixels
    data = file_bytes(source, name, most_bytes(most))
    check_file(data, name, most)
    try:
        with (
            PILLOW_IS_QUIET,
            Image.open(io.BytesIO(data), formats=[*ANIMATIONS.values()]) as opened,
        ):
            if opened.width * opened.height > most:
                raise UserError(
                    f"{name} has more than the {most / 1e6:g} megapixels allowed; max_pixels"
                    " allows more"
                )
            total = getattr(opened, "n_frames", 1)
            if not 1 < total <= MOST_SOURCE_FRAMES:
                raise UserError(
                    f"{name} has {total} frame{'s' * (total != 1)}; a clip has 2 to"
                    f" {MOST_SOURCE_FRAMES}"
                )
            if total * opened.width * opened.height > MOST_SOURCE_PIXELS:
                raise UserError(
                    f"{name} has {total} frames of {opened.width} x {opened.height} pixels; an"
                    f" animation may have {MOST_SOURCE_PIXELS // 10**9} gigapixels"
                )
            source_fps = _rate(opened, total)
            numbers = frame_numbers(total, source_fps, limits.fps, limits.max_frames)
            frames = _frames_of(opened, numbers, name)
            return _clip(frames, numbers, total, source_fps, name, limits)
    except UserError:
        raise
    except Exception as problem:  # a decoder that is fed garbage may raise anything
        raise UserError(f"{name} is truncated or damaged: {reason(problem)}") from problem


def _rate(opened: Image.Image, total: int) -> float:
    """Frames a second: as many in a second as the mean of what each stands for; 10 where the file
    does not say it, as browsers show it."""
    lasting_ms = 0.0
    for number in range(total):
        opened.seek(number)
        opened.load()  # WebP says how long a frame stands once it is decoded
        lasting_ms += float(opened.info.get("duration", 0) or 0)
    return 1000 * total / lasting_ms if math.isfinite(lasting_ms) and lasting_ms > 0 else 10.0


def _frames_of(opened: Image.Image, numbers: Sequence[int], name: str) -> Iterator[Image.Image]:
    for number, same in groupby(numbers):
        opened.seek(number)
        frame = to_rgb(opened.copy(), name)
        yield from (frame for _ in same)


def _from_video(path: Path, name: str, limits: FrameLimits) -> Clip:
    """By OpenCV, frame by frame at its place."""
    most = limits.max_pixels
    try:
        import cv2
    except ImportError:
        raise missing_package("cv2", name) from None
    opened = cv2.VideoCapture(str(path.resolve()))
    try:
        total = int(opened.get(cv2.CAP_PROP_FRAME_COUNT)) if opened.isOpened() else 0
        source_fps = float(opened.get(cv2.CAP_PROP_FPS)) if total > 0 else 0.0
        if total < 1 or not 0 < source_fps <= MOST_FPS:
            raise UserError(f"{name} is damaged, or a video that OpenCV cannot read")
        sides = (opened.get(cv2.CAP_PROP_FRAME_WIDTH), opened.get(cv2.CAP_PROP_FRAME_HEIGHT))
        if sides[0] * sides[1] > most:
            raise UserError(
                f"{name} has more than the {most / 1e6:g} megapixels allowed; max_pixels allows"
                " more"
            )
        numbers = frame_numbers(total, source_fps, limits.fps, limits.max_frames)
        frames = _decoded(opened, numbers, name)
        return _clip(frames, numbers, total, source_fps, name, limits)
    finally:
        opened.release()


def _decoded(opened: Any, numbers: Sequence[int], name: str) -> Iterator[Image.Image]:
    import cv2

    for number in numbers:
        opened.set(cv2.CAP_PROP_POS_FRAMES, number)
        is_read, frame_HW3 = opened.read()
        if not is_read and number == numbers[0]:
            raise UserError(f"{name} is damaged: its first frame cannot be read")
        if not is_read:  # many files count a frame or two that are not there
            logger.warning("%s: frame %d cannot be read, so the clip ends before it", name, number)
            return
        yield Image.fromarray(frame_HW3[..., ::-1])
