"""A clip: a folder of pictures, an animation or a video file, as frames with their times.

A folder's pictures are frames in the order of their names. Pillow reads animations (GIF, WebP,
PNG), OpenCV, which mlx-vlm brings, video files. Frames are taken by mlx-vlm's own rule.
"""

import io
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..checkpoints.errors import UserError, missing_package, short
from .animations import count_frames, decoded_frames, frame_rate, naming_damage
from .image import MAX_PIXELS, PILLOW_IS_QUIET, open_image
from .image_files import check_file, gif_fault
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
MOST_IMAGES_IN_MEMORY = 16  # of the largest size, of all frames together
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".heic")
ANIMATIONS = {b"GIF8": "GIF", b"\x89PNG": "PNG", b"RIFF": "WEBP"}  # by the first four bytes
MATROSKA, MP4, RIFF, AVI = b"\x1a\x45\xdf\xa3", b"ftyp", b"RIFF", b"AVI "
KINDS_OF_VIDEO = (
    "an MP4, MOV, MKV, WebM or AVI file, an animated GIF, WebP or PNG, or a folder of pictures"
)


@dataclass(frozen=True)
class Clip:
    """Frames of one size, in order.

    `numbers` are theirs among the `total` frames of the source, of which there are `fps` a second;
    `missing` more could not be read behind them.
    """

    frames: list[Image.Image]
    numbers: list[int]
    total: int
    fps: float
    missing: int = 0

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
        return replace(self, frames=[frame.resize(size) for frame in self.frames])


@dataclass(frozen=True)
class FrameOptions:
    """Of a clip: frames a second, the most frames, the most pixels of one, what each is turned into
    as soon as it is decoded, and what is called before each that is decoded, to end it."""

    fps: float
    max_frames: int
    max_pixels: int
    fit: Callable[[Image.Image], Image.Image] | None = None
    check: Callable[[], None] | None = None


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
    check: Callable[[], None] | None = None,
) -> Clip:  # fmt: skip
    """At most `max_frames` frames of a clip, each of at most `max_pixels`; a Clip as it is.

    `source` is a path, a data URI, a file's bytes or a list of pictures. `fit` makes another
    picture of each frame, for example a smaller one. `check` is called before each frame that is
    decoded, and may raise.

    Of a file `fps` frames a second are taken. The pictures of a folder or a list are all taken, as
    `fps` a second. Where that is more than `max_frames`, these are spread evenly.

    Raises UserError, one sentence that names the path: no such file, nothing that can be read,
    frames of several sizes, too many pixels.
    """
    if isinstance(source, Clip):
        return source
    options = FrameOptions(fps, max_frames, max_pixels, fit, check)
    if isinstance(source, str) and source[: len(DATA_URI)].lower() == DATA_URI:
        content = file_bytes(DATA_URI + source[len(DATA_URI) :], "the data URI", 0)
        source = NamedBytes(content, "the data URI")
    if isinstance(source, bytes):
        name = source.name if isinstance(source, NamedBytes) else "the video"
        return _from_file(source, name, options)
    if not isinstance(source, str | os.PathLike):
        return _from_pictures([*source], "the list of frames", options)
    path = Path(source)
    if path.is_dir():
        return _from_pictures(pictures_of(path), str(path), options)
    return _from_file(path, str(path), options)


def pictures_of(folder: Path) -> list[Path]:
    """The frames of a folder, in order."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES)


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
    options: FrameOptions,
) -> Clip:  # fmt: skip
    """The clip of these frames. Raises UserError for several sizes, and more than memory holds."""
    taken, pixels, most = list[Image.Image](), 0, options.max_pixels
    for frame in frames:
        frame = options.fit(frame) if options.fit else frame
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
    here, missing = numbers[: len(taken)], len(numbers) - len(taken)
    return Clip(taken, here, total, float(fps), missing)


def _from_pictures(sources: Sequence[Any], name: str, options: FrameOptions) -> Clip:
    if not sources:
        raise UserError(f"{name} has no pictures ({', '.join(s[1:] for s in PICTURES)})")
    total = len(sources)
    numbers = _spread(total, min(total, options.max_frames))

    def opened() -> Iterator[Image.Image]:
        for number in numbers:
            if options.check:
                options.check()
            yield open_image(sources[number], options.max_pixels)

    return _clip(opened(), numbers, total, options.fps, name, options)


def _from_file(source: Path | bytes, name: str, options: FrameOptions) -> Clip:
    """The clip of a file, by the kind that its first bytes say."""
    if isinstance(source, bytes):
        head = source[:12]
    else:
        try:
            with source.open("rb") as file:
                head = file.read(12)
        except OSError as problem:
            raise UserError(f"{name} cannot be read: {problem.strerror}") from None
    is_avi = (head[:4], head[8:]) == (RIFF, AVI)
    if head[:4] in ANIMATIONS and not is_avi:
        return _from_animation(source, name, options)
    if head[4:8] == MP4 or head[:4] == MATROSKA or is_avi:
        with _on_disk(source, name) as path:
            return _from_video(path, name, options)
    raise UserError(f"{name} is not {KINDS_OF_VIDEO}")


@contextmanager
def _on_disk(source: Path | bytes, name: str) -> Iterator[Path]:
    """A file of these bytes until the end of the block, since OpenCV reads no others. Raises
    UserError where it cannot be written."""
    if isinstance(source, Path):
        yield source
        return
    with ExitStack() as held:
        try:
            folder = held.enter_context(tempfile.TemporaryDirectory(prefix="mlx-vlm-prune-"))
            path = Path(folder) / "video"
            path.write_bytes(source)
        except OSError as problem:
            why = problem.strerror or problem
            raise UserError(f"{name} needs a temporary file, which fails: {why}") from None
        yield path


def _from_animation(source: Path | bytes, name: str, options: FrameOptions) -> Clip:
    """By Pillow. The frames of the source are taken as evenly spaced over its length."""
    data = file_bytes(source, name, most_bytes(options.max_pixels))
    check_file(data, name, options.max_pixels)
    if fault := gif_fault(data, is_animated=True):
        raise UserError(f"{name} {fault}")
    with PILLOW_IS_QUIET, ExitStack() as held:
        with naming_damage(name):
            formats = [*ANIMATIONS.values()]
            opened = held.enter_context(Image.open(io.BytesIO(data), formats=formats))
            total = count_frames(opened, name, options.max_pixels)
        source_fps = frame_rate(opened, total, name, options.check)
        numbers = frame_numbers(total, source_fps, options.fps, options.max_frames)
        frames = decoded_frames(opened, numbers, name, options.check)
        return _clip(frames, numbers, total, source_fps, name, options)


def _from_video(path: Path, name: str, options: FrameOptions) -> Clip:
    """By OpenCV, frame by frame at its place."""
    most = options.max_pixels
    try:
        import cv2
    except ImportError:
        raise missing_package("cv2", name) from None
    opened = cv2.VideoCapture(str(path.resolve()), cv2.CAP_FFMPEG)
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
        numbers = frame_numbers(total, source_fps, options.fps, options.max_frames)
        frames = _decoded(opened, numbers, name, options)
        return _clip(frames, numbers, total, source_fps, name, options)
    finally:
        opened.release()


def _decoded(
    opened: Any, numbers: Sequence[int], name: str, options: FrameOptions
) -> Iterator[Image.Image]:
    import cv2

    for number in numbers:
        if options.check:
            options.check()
        opened.set(cv2.CAP_PROP_POS_FRAMES, number)
        is_read, frame_HW3 = opened.read()
        if not is_read and number == numbers[0]:
            raise UserError(f"{name} is damaged: its first frame cannot be read")
        if not is_read:  # many files count a frame or two that are not there
            logger.warning("%s: frame %d cannot be read, so the clip ends before it", name, number)
            return
        yield Image.fromarray(frame_HW3[..., ::-1])
