"""The token loop of a model of mlx-vlm's: its own, with our figures.

Shapes: l rows of the prompt.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from numbers import Integral, Real
from traceback import walk_tb
from typing import Any

import mlx.core as mx
from PIL import Image

from ..checkpoints.errors import UserError, short
from ..checkpoints.tokenizer_trial import library_errors
from ..generation.request import LogitsProcessor, Request
from ..generation.result import GenerationResponse, GenerationResult, Transcript
from ..generation.sampling import SeededSampler, needs_sampler, penalties
from ..generation.steps import (
    check_first_logits,
    first_not_finite,
    naming_faulty_part,
    process_logits,
    sample_token,
)
from ..generation.stream import initial_result
from ..inputs.ends import end_token_ids
from ..inputs.image import MAX_PIXELS, open_image
from ..inputs.video import Clip
from ..machine.clock import TOGETHER, Clock, request_clock
from ..pruners import Pipeline
from .clips import check_clip, open_clip, prepare_clip, with_clip
from .compatibility import check_cache_options, check_pipeline
from .families import host_of
from .families.pruner_defaults import plan_for_host
from .host import Host, generation_stream
from .prefill import prefill_through_cuts, prompt_cache, prompt_cache_bytes
from .prepared_inputs import PreparedInputs, ProcessorOptions
from .prompt import (
    ImageBudget,
    PrunedPrompt,
    ViewEncoder,
    encode_images_and_text,
    prepare_prompt,
    prune_prompt,
)
from .turns import RequestTurns
from .views import View

CACHE_OPTIONS = ("prefill_step_size", "kv_bits", "quantized_kv_start", "max_kv_size")
Seen = Clip | Sequence[Image.Image]  # what a prompt is about
FEWEST_ROWS = 5  # of a cache that holds the first four rows and the latest


def cache_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """mlx-vlm's own options, where they are given. Raises UserError."""
    options = {name: given[name] for name in CACHE_OPTIONS if name in given}
    for name, value in options.items():
        kind = Real if name == "kv_bits" else Integral
        if isinstance(value, bool) or not isinstance(value, kind):
            raise UserError(f"{name} is {value!r}; it must be a number")
    step_size, bits, start, size = (options.get(name) for name in CACHE_OPTIONS)
    if step_size is not None and step_size < 1:
        raise UserError(f"prefill_step_size is {step_size}; it must be at least 1")
    if bits is not None and (not 1.5 <= bits <= 8 or bits == 7):
        raise UserError(f"kv_bits is {bits:g}; it must be from 1.5 to 8, and not 7")
    if start is not None and start < 0:
        raise UserError(f"quantized_kv_start is {start}; it must be at least 0")
    if start is not None and bits is None:
        raise UserError("quantized_kv_start says from when on kv_bits holds; give both")
    if size is not None and size < FEWEST_ROWS:
        raise UserError(f"max_kv_size is {size}; it must be at least {FEWEST_ROWS}")
    if size is not None and bits is not None:
        raise UserError("max_kv_size and kv_bits do not go together in mlx-vlm; give one")
    return options


def resize_option(shape: Sequence[int] | None) -> tuple[int, int] | None:
    """Width and height that a picture is to fit in, from one number or two. Raises UserError."""
    if shape is None:
        return None
    if not isinstance(shape, Sequence) or not all(isinstance(side, Integral) for side in shape):
        raise UserError(f"resize_shape is {shape!r}; give one or two sides, each at least 1")
    sides = f"resize_shape is {' '.join(map(str, shape))}"
    if len(shape) not in (1, 2) or min(shape) < 1:
        raise UserError(f"{sides}; give one or two sides, each at least 1")
    if shape[0] * shape[-1] > MAX_PIXELS:
        raise UserError(f"{sides}; the most is {MAX_PIXELS} pixels")
    return shape[0], shape[-1]


def processor_options(given: Mapping[str, Any]) -> ProcessorOptions:
    """How pictures are to be prepared. Raises UserError."""
    kwargs = given.get("processor_kwargs") or {}
    if not isinstance(kwargs, Mapping) or not all(isinstance(name, str) for name in kwargs):
        raise UserError(f"processor_kwargs is {short(kwargs)}; it must be a mapping of options")
    return ProcessorOptions(resize_option(given.get("resize_shape")), kwargs)


def open_images(request: Request) -> list[Image.Image]:
    """The images of a request. Raises UserError."""
    return [open_image(source, request.pixel_limit) for source in request.images]


def stream_generate(
    model: Any, processor: Any, request: Request, encode: ViewEncoder | None = None
) -> Iterator[GenerationResponse]:
    """Stream an answer; `encode` may know the images' views already. Raises UserError."""
    host = host_of(model, processor)
    pipeline, turns, views = plan_for_host(host, request.pruner), RequestTurns(host), list[View]()
    is_seen = bool(request.images) or request.video is not None
    in_one_go = pipeline.spec == "none" and is_seen  # a wait in between costs time
    clock = Clock(("image", "pruner", TOGETHER)) if in_one_go else request_clock()
    decoding, options = decoding_arguments(request), request.given_host_options
    policy = check_pipeline(host, pipeline, request.positions)
    check_cache_options(host, pipeline, options)
    with turns.turn():  # tokenizers are not for several threads either
        ends = further_ends(host, request)
    images, preparation = open_images(request), processor_options(options)
    if request.video is not None:
        check_clip(host, pipeline)
    clip = open_clip(request, preparation)
    with turns.turn():
        inputs = prepare_request(host, request, clip or images, preparation)
        clock.end_part("image", inputs.pixels)
        mx.reset_peak_memory()
        with _naming_faulty_part(host, inputs, views), generation_stream(), clock.running():
            by_view = ImageBudget(request.keep_ratio, request.keep_tokens).by_view(pipeline)
            views += encode_images_and_text(host, inputs, pipeline, by_view, encode)
            budgets = by_view(views)
            prompt = prune_prompt(host, inputs, views, pipeline, budgets, policy)
            host.check_length(prompt.length)
            step_size = options.get("prefill_step_size")
            prompt = prefill_through_cuts(host, prompt, pipeline, budgets, policy, step_size)
    initial = partial(_initial_result, host, prompt, pipeline, clip or images, preparation)
    with _naming_faulty_part(host, inputs, views):
        pieces = turns.each(_decode(host, prompt, initial, clock, decoding), ends)
        yield from explain_kv_bits_errors(pieces, options.get("kv_bits"))


def read_first_token(
    host: Host, prompt: PrunedPrompt, pipeline: Pipeline, images: Sequence[Image.Image],
    preparation: ProcessorOptions, clock: Clock, options: Mapping[str, Any] | None = None,
) -> GenerationResult:  # fmt: skip
    """Read a prompt as an answer of one token does; `clock` ends the prefill with it. `options` are
    those of the cache."""
    initial = partial(_initial_result, host, prompt, pipeline, images, preparation)
    decoding = decoding_arguments(Request("", [], max_tokens=1, host_options=options))
    pieces = _decode(host, prompt, initial, clock, decoding)
    *_, piece = explain_kv_bits_errors(pieces, decoding.get("kv_bits"))
    assert piece.result, "the last piece has the result"
    return piece.result


def prepare_request(
    host: Host, request: Request, seen: Seen, preparation: ProcessorOptions
) -> PreparedInputs:
    """The prompt with its clip or its images, as ids and pixels. Raises UserError."""
    if isinstance(seen, Clip):
        return prepare_clip(host, request, seen, preparation)
    return prepare_prompt(
        host, request.prompt, seen, request.chat_template_config, preparation,
        request.history, request.system,
    )  # fmt: skip


def _initial_result(
    host: Host, prompt: PrunedPrompt, pipeline: Pipeline, seen: Seen,
    preparation: ProcessorOptions,
) -> GenerationResult:  # fmt: skip
    """The result before its first token; reads which tokens stayed."""
    depth, views = len(host.language.layers), prompt.views
    answer = initial_result(prompt.trace, depth, pipeline, prompt.positions)
    if isinstance(seen, Clip):
        return with_clip(host, answer, seen, views)
    images = seen
    return replace(
        answer, views=host.drawn_views(views, images),
        layouts=host.layouts(views, [image.size for image in images]),
        images=host.placements(views, images, preparation),
    )  # fmt: skip


def _naming_faulty_part(
    host: Host, inputs: PreparedInputs, views: Sequence[View]
) -> AbstractContextManager[None]:
    return naming_faulty_part(lambda: _faulty_part(host, inputs, views))


def _faulty_part(host: Host, inputs: PreparedInputs, views: Sequence[View]) -> str:
    """Which part of a model gives what is not finite."""
    features = [view.signals.x_BND for view in views]
    parts = [("the vision tower", x_BND) for x_BND in features]
    parts += [("the projector", host.project(x_BND)) for x_BND in features]
    words = [token for token in inputs.ids if token != host.image_token_id(inputs)]
    words_1TD = host.embed(mx.array([words or [0]]))
    return first_not_finite([*parts, ("the table of word embeddings", words_1TD)])


def decoding_arguments(request: Request) -> dict[str, Any]:
    """What mlx-vlm's loop is told of how to decode. Raises UserError."""
    from mlx_vlm import sample_utils

    sampler, processors = request.sampler, [*(request.logits_processors or ())]
    if needs_sampler(request):
        sampler = SeededSampler(sample_utils.make_sampler, request)
    if request.repetition_penalty:
        processors = [*penalties(sample_utils, request), *processors]
    arguments = {
        "max_tokens": request.max_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "seed": request.seed,
        "top_k": request.top_k,
        "sampler": sampler and partial(sample_token, sampler),
        "logits_processors": processors,
    }
    return arguments | cache_options(request.given_host_options)


def further_ends(host: Host, request: Request) -> frozenset[int]:
    """The ids that end an answer beside the checkpoint's own. Raises UserError."""
    tokenizer = getattr(host.processor, "tokenizer", host.processor)

    def encode(text: str) -> list[int]:
        host.try_text(text)
        with library_errors(f"this {host.kind} model's tokenizer fails"):
            ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return ids

    if request.eos_tokens is None:
        return frozenset()
    return end_token_ids(
        request.eos_tokens, tokenizer.get_vocab().get, encode, f"this {host.kind} model's tokenizer"
    )


def explain_kv_bits_errors(
    pieces: Iterator[GenerationResponse], kv_bits: float | None
) -> Iterator[GenerationResponse]:
    """The pieces; where mlx-vlm cannot give the cache so few bits, UserError says so.

    Errors of the user's sampler and logits processors stay as they are.
    """
    try:
        yield from pieces
    except ValueError as problem:
        calls = {frame.f_code for frame, _ in walk_tb(problem.__traceback__)}
        is_users = not calls.isdisjoint({sample_token.__code__, process_logits.__code__})
        if kv_bits is None or isinstance(problem, UserError) or is_users:
            raise
        reason = " ".join(str(problem).split())
        raise UserError(f"kv_bits={kv_bits:g} cannot be had of this model: {reason}") from problem


class WholePrompt:
    """A logits processor that gets all tokens of a prompt, as mlx-lm's loop gives them.

    mlx-vlm's loop gives those that it read last: one, or all that pruning has left.
    """

    def __init__(self, processor: LogitsProcessor, ids: Sequence[int]):
        self.processor, self.prompt_L, self.answer_tokens = processor, mx.array([*ids]), 0

    def __call__(self, tokens_L: mx.array, logits_1V: mx.array) -> mx.array:
        """Logits (1, V); each call is for one more token of the answer."""
        answer_L = tokens_L[tokens_L.size - self.answer_tokens :]
        self.answer_tokens += 1
        tokens_L = mx.concatenate([self.prompt_L, answer_L.astype(self.prompt_L.dtype)])
        return process_logits(self.processor, tokens_L, logits_1V)


def _decode(
    host: Host, prompt: PrunedPrompt, initial: Callable[[], GenerationResult], clock: Clock,
    decoding: dict[str, Any],
) -> Generator[GenerationResponse, None, None]:  # fmt: skip
    """mlx-vlm's pieces, one for each token. It repeats the last one when it says why it ended, so
    the last that may come is held back until then. `initial` reads which tokens stayed, so it is
    called behind the first token."""
    from mlx_vlm.generate import stream_generate as decode

    cache = prompt_cache(host, prompt, decoding.get("max_kv_size"))
    arguments = {"prompt_cache": cache, **decoding, **prompt.arguments}
    if processors := decoding["logits_processors"]:
        ids = prompt.inputs.ids
        arguments["logits_processors"] = [WholePrompt(each, ids) for each in processors]
    transcript: Transcript | None = None
    held = ""
    for piece in decode(host.model, host.processor, "", **arguments):
        if transcript is None:
            clock.end_part("prefill")
            if piece.logprobs is not None:
                check_first_logits(piece.logprobs)
            answer = initial().prefilled(prompt.length, clock.ttft())
            size = prompt.cache_bytes or prompt_cache_bytes(cache, prompt.length)
            transcript = Transcript(replace(answer, cache_bytes=size))
        if piece.finish_reason is None and piece.generation_tokens == decoding["max_tokens"]:
            held = piece.text
            continue
        yield transcript.add(
            GenerationResponse(
                text=held + piece.text,
                token=piece.token,
                from_draft=False,
                prompt_tokens=answer.prompt_tokens,
                prompt_tps=answer.prompt_tps,
                generation_tokens=piece.generation_tokens,
                generation_tps=piece.generation_tps,
                peak_memory=piece.peak_memory,
                finish_reason=piece.finish_reason,
            )
        )
