"""A request: the prompt, its images, the pruner and its budget, and the sampling arguments."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, TypedDict

import mlx.core as mx

from ..checkpoints.errors import UserError, check_text, short
from ..inputs.image import MAX_PIXELS, MOST_PIXELS, check_max_pixels
from ..inputs.image_sources import (
    KINDS_OF_SOURCE,
    ImageSource,
    check_is_file,
    is_source,
    is_url,
    most_bytes,
    read_open_file,
    source_name,
)
from ..inputs.messages import Turn
from ..inputs.video import (
    DEFAULT_FPS,
    DEFAULT_MAX_FRAMES,
    Clip,
    VideoSource,
    check_frame_options,
    check_source,
    open_video,
)
from ..pruners import Pipeline, Pruner
from ..pruners.contract import Policy

# As mlx-lm's, of L tokens and V words: log-probabilities (1, V) to a token id (1,), and
# (tokens (L,), logits (1, V)) to logits (1, V). The tokens are the whole prompt's, with all its
# placeholders, and those of the answer so far.
Sampler = Callable[[mx.array], mx.array]
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]
HOST_OPTIONS = (
    "prefill_step_size", "kv_bits", "quantized_kv_start", "max_kv_size", "resize_shape",
    "processor_kwargs",
)  # fmt: skip


class GenerateOptions(TypedDict, total=False):
    """The options of `stream_generate`, `generate` and `batch_generate`."""

    pruner: str | Pruner | Pipeline | None
    keep_ratio: float | None
    keep_tokens: int | None
    caution: bool
    positions: Policy | None
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    top_k: int
    min_p: float
    repetition_penalty: float | None
    repetition_context_size: int
    sampler: Sampler | None
    logits_processors: Sequence[LogitsProcessor] | None
    eos_tokens: Sequence[str | int] | None
    num_draft_tokens: int | None
    system: str | None
    chat_template_config: Mapping[str, Any] | None
    max_pixels: int | None
    host_options: Mapping[str, Any] | None
    allow_url: bool
    video: VideoSource | None
    fps: float
    max_frames: int


@dataclass(frozen=True)
class Request:
    """The arguments of `stream_generate`. Raises UserError for what no model can do."""

    prompt: str
    images: Sequence[ImageSource]
    pruner: str | Pruner | Pipeline | None = None
    keep_ratio: float | None = None
    keep_tokens: int | None = None
    positions: Policy | None = None
    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float | None = None
    repetition_context_size: int = 20
    sampler: Sampler | None = None
    logits_processors: Sequence[LogitsProcessor] | None = None
    eos_tokens: Sequence[str | int] | None = None
    num_draft_tokens: int | None = None
    system: str | None = None
    chat_template_config: Mapping[str, Any] | None = None
    max_pixels: int | None = None
    host_options: Mapping[str, Any] | None = None
    allow_url: bool = False
    video: VideoSource | None = None
    fps: float = DEFAULT_FPS
    max_frames: int = DEFAULT_MAX_FRAMES
    caution: bool = True
    history: Sequence[Turn] = ()  # earlier turns, whose images come first

    def __post_init__(self) -> None:
        _check_kinds(self)
        if self.positions not in (None, "keep", "renumber"):
            raise UserError(f"positions is {self.positions!r}; it is keep or renumber")
        check_decoding(self.max_tokens, self.temperature, self.top_p, self.seed)
        check_sampling_options(
            self.top_k, self.min_p, self.repetition_penalty, self.repetition_context_size
        )
        if self.num_draft_tokens is not None and self.repetition_penalty:
            raise UserError(
                "num_draft_tokens is for plain greedy answers; leave out repetition_penalty"
            )
        if self.num_draft_tokens is not None and (self.sampler or self.logits_processors):
            raise UserError(
                "num_draft_tokens is for greedy answers; leave out sampler and logits_processors"
            )
        if self.max_pixels is not None:
            check_max_pixels(self.max_pixels)
        if self.host_options is not None:
            _check_host_options(self.host_options)
        _check_video(self)

    @property
    def pixel_limit(self) -> int:
        """The most pixels that an image may have."""
        return pixel_limit(self.max_pixels, self.host_options)

    @property
    def given_host_options(self) -> dict[str, Any]:
        """The options for mlx-vlm's models that have a value."""
        options = self.host_options or {}
        return {name: value for name, value in options.items() if value is not None}

    def open_video(self) -> Clip | None:
        """Its video, if it has one. Raises UserError."""
        if self.video is None:
            return None
        return open_video(self.video, self.fps, self.max_frames, self.pixel_limit)


def make_request(prompt: str, image: Any, options: Mapping[str, Any]) -> Request:
    """The request with a caller's options, its images as a list. Raises UserError."""
    limit = pixel_limit(options.get("max_pixels"), options.get("host_options"))
    images = list_images(image, options.get("allow_url", False), limit)
    return Request(prompt, images, **options)


def _check_video(request: Request) -> None:
    """Raises UserError for what is no clip, or for one beside pictures."""
    check_frame_options(request.fps, request.max_frames)
    if request.video is None:
        return
    check_source(request.video)
    if request.images:
        raise UserError("a prompt is about a video or about images; leave out one of them")


def _check_kinds(request: Request) -> None:
    """Raises UserError for a value of another kind, where nothing else would name it."""
    check_text(request.prompt)
    processors, ends = request.logits_processors, request.eos_tokens
    is_list = processors is None or isinstance(processors, Sequence)
    kinds = {
        "sampler": (request.sampler is None or callable(request.sampler), "a function"),
        "logits_processors": (is_list and all(map(callable, processors or ())), "a list of"
                              " functions"),
        "eos_tokens": (isinstance(ends or (), Sequence | set | frozenset) and all(
            is_whole(end) or isinstance(end, str) for end in ends or ()), "a list of tokens"),
        "system": (isinstance(request.system, str | None), "a str"),
        "chat_template_config": (isinstance(request.chat_template_config or {}, Mapping),
                                 "a mapping"),
        "num_draft_tokens": (is_whole(request.num_draft_tokens or 1), "a whole number"),
        "allow_url": (isinstance(request.allow_url, bool), "True or False"),
        "caution": (isinstance(request.caution, bool), "True or False"),
    }  # fmt: skip
    for name, (is_of_kind, kind) in kinds.items():
        if not is_of_kind:
            raise UserError(f"{name} is {getattr(request, name)!r}; it must be {kind}")


def pixel_limit(max_pixels: int | None, host_options: Mapping[str, Any] | None) -> int:
    """The most pixels that an image may have: `max_pixels`; else, where it is made to fit
    `resize_shape`, what Pillow opens; else MAX_PIXELS."""
    if max_pixels is not None:
        check_max_pixels(max_pixels)
        return max_pixels
    fits = isinstance(host_options, Mapping) and host_options.get("resize_shape")
    return MOST_PIXELS if fits else MAX_PIXELS


def is_whole(value: Any) -> bool:
    """A whole number, which True is not?"""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _check_host_options(options: Any) -> None:
    """Raises UserError for what is no mapping, or has an unknown name."""
    known = ", ".join(HOST_OPTIONS)
    if not isinstance(options, Mapping):
        raise UserError(f"host_options is {options!r}; it must be a mapping of {known}")
    for name in options:
        if name not in HOST_OPTIONS:
            raise UserError(f"host_options has no {name!r}; there are {known}")


def check_decoding(max_tokens: int, temperature: float, top_p: float, seed: int) -> None:
    """Say early how an answer cannot be decoded. Raises UserError."""
    if not (is_whole(max_tokens) and max_tokens >= 1):
        raise UserError(f"max_tokens is {max_tokens!r}; it must be at least 1, a whole number")
    if not (isinstance(temperature, Real) and 0 <= temperature < float("inf")):
        raise UserError(f"temperature is {temperature!r}; it must be 0 or more")
    if not (isinstance(top_p, Real) and 0 < top_p <= 1):
        raise UserError(f"top_p is {top_p!r}; it must be above 0 and at most 1")
    if not (is_whole(seed) and 0 <= seed < 2**63):
        raise UserError(f"seed is {seed!r}; it must be at least 0 and below 2**63")


def check_sampling_options(
    top_k: int, min_p: float, repetition_penalty: float | None, repetition_context_size: int
) -> None:
    """Raises UserError for what mlx-lm's samplers and penalties cannot be given."""
    if not (is_whole(top_k) and top_k >= 0):
        raise UserError(f"top_k is {top_k!r}; it must be a whole number, 0 for all words")
    if not (isinstance(min_p, Real) and 0 <= min_p <= 1):
        raise UserError(f"min_p is {min_p!r}; it must be from 0 to 1")
    penalty, size = repetition_penalty, repetition_context_size
    if penalty is not None and not (isinstance(penalty, Real) and 0 <= penalty < float("inf")):
        raise UserError(f"repetition_penalty is {penalty!r}; it must be 0 or more")
    if not (is_whole(size) and size >= 1):
        raise UserError(
            f"repetition_context_size is {size!r}; it must be at least 1, a whole number"
        )


def list_images(
    image: ImageSource | Sequence[ImageSource] | None,
    allow_url: bool | None = None,
    max_pixels: int = MAX_PIXELS,
) -> list[ImageSource]:
    """One image, several or none as a list; of open files, and of URLs where they are allowed, the
    bytes. `allow_url` is None where there is no such option. An open file may be as large as an
    image of `max_pixels` needs.

    Raises UserError for what is no image's source, and for a path that is no file.
    """
    if image is None:
        return []
    given: Any = image
    is_several = isinstance(image, Iterable) and not isinstance(image, Mapping | mx.array)
    images = [*given] if is_several and not is_source(image) else [given]
    for source in images:
        if not is_source(source):
            raise UserError(f"an image is {short(source)}; give {KINDS_OF_SOURCE}")
        if is_url(source) and allow_url is False:
            raise UserError(
                f"{source_name(source)} is a URL; set allow_url, or download the image and give its"
                " path"
            )
    for source in images:
        check_is_file(source)
    return [_fetched(source, allow_url, max_pixels) for source in images]


def _fetched(source: Any, allow_url: bool | None, max_pixels: int) -> ImageSource:
    """The bytes of a source that can be read once only, or takes time."""
    if hasattr(source, "read"):
        return read_open_file(source, most_bytes(max_pixels))
    if not (allow_url and is_url(source)):
        given: ImageSource = source
        return given
    from ..inputs.image_urls import download  # 30 ms of imports, seldom needed

    return download(source)
