"""The token loop of a model of mlx-vlm's: its own, with our figures.

Shapes: l rows of the prompt.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import mlx.core as mx

from ..checkpoints.errors import UserError
from ..generation.request import Request
from ..generation.result import GenerationResult
from ..generation.stream import empty_answer
from ..inputs.image import MAX_PIXELS, open_image
from ..machine.clock import Clock
from ..pruners import plan
from .compatibility import check_kv_bits, check_pipeline
from .families import host_of
from .host import Host, generation_stream
from .prefill import prefill_through_cuts, prompt_cache_bytes
from .prompt import (
    PrunedPrompt,
    budgets_by_view,
    encode_images_and_text,
    prepare_prompt,
    prune_prompt,
)

CACHE_OPTIONS = ("prefill_step_size", "kv_bits", "quantized_kv_start")
TOGETHER = "vision and prefill"  # where nothing is pruned, timed as mlx-vlm computes it


def cache_options(request: Request) -> dict[str, Any]:
    """mlx-vlm's own options, where they are given. Raises UserError."""
    step_size, bits, start = (getattr(request, name) for name in CACHE_OPTIONS)
    if step_size is not None and step_size < 1:
        raise UserError(f"prefill_step_size is {step_size}; it must be at least 1")
    if bits is not None and (not 1.5 <= bits <= 8 or bits == 7):
        raise UserError(f"kv_bits is {bits:g}; it must be from 1.5 to 8, and not 7")
    if start is not None and start < 0:
        raise UserError(f"quantized_kv_start is {start}; it must be at least 0")
    if start is not None and bits is None:
        raise UserError("quantized_kv_start says from when on kv_bits holds; give both")
    options = zip(CACHE_OPTIONS, (step_size, bits, start), strict=True)
    return {name: value for name, value in options if value is not None}


def resize_option(shape: Sequence[int] | None) -> tuple[int, int] | None:
    """Width and height that a picture is to fit in, from one number or two. Raises UserError."""
    if shape is None:
        return None
    sides = f"resize_shape is {' '.join(map(str, shape))}"
    if len(shape) not in (1, 2) or min(shape) < 1:
        raise UserError(f"{sides}; give one or two sides, each at least 1")
    if shape[0] * shape[-1] > MAX_PIXELS:
        raise UserError(f"{sides}; the most is {MAX_PIXELS} pixels")
    return shape[0], shape[-1]


def stream_generate(model: Any, processor: Any, request: Request) -> Iterator[GenerationResult]:
    """Answer a prompt about images, one piece of text at a time. Raises UserError."""
    host, pipeline = host_of(model, processor), plan(request.pruner)
    in_one_go = pipeline.spec == "none" and bool(request.images)  # a wait in between costs time
    clock = Clock(("image", TOGETHER)) if in_one_go else Clock()
    decoding = {"max_tokens": request.max_tokens, "temperature": request.temperature}
    decoding |= {"top_p": request.top_p, "seed": request.seed} | cache_options(request)
    policy = check_pipeline(host, pipeline, request.positions)
    check_kv_bits(host, pipeline, request.kv_bits)
    images = [open_image(source) for source in request.images]
    size = resize_option(request.resize_shape)
    inputs = prepare_prompt(host, request.prompt, images, request.template, size)
    clock.lap("image", inputs.pixels)
    mx.reset_peak_memory()
    with host.preserve_state():
        with generation_stream(), nullcontext() if in_one_go else clock.running():
            views = encode_images_and_text(host, inputs, pipeline)
            budgets = budgets_by_view(views, request.keep_ratio, request.keep_tokens, pipeline)
            prompt = prune_prompt(host, inputs, views, pipeline, budgets, policy)
            host.check_length(prompt.length)
            step_size = request.prefill_step_size
            prompt = prefill_through_cuts(host, prompt, pipeline, budgets, policy, step_size)
        answer = empty_answer(prompt.trace, len(host.language.layers), pipeline, prompt.positions)
        pictures = zip(host.pictures(views, images), views, strict=True)
        shown = [(picture, view.signals.grid) for picture, view in pictures]
        answer = replace(answer, prompt_tokens=prompt.length, views=shown)
        yield from explain_kv_bits_errors(
            _decode(host, prompt, answer, clock, decoding), request.kv_bits
        )


def explain_kv_bits_errors(
    pieces: Iterator[GenerationResult], kv_bits: float | None
) -> Iterator[GenerationResult]:
    """The pieces; where mlx-vlm cannot give the cache so few bits, UserError says so."""
    try:
        yield from pieces
    except ValueError as problem:
        if kv_bits is None or isinstance(problem, UserError):
            raise
        reason = " ".join(str(problem).split())
        raise UserError(f"kv_bits={kv_bits:g} cannot be had of this model: {reason}") from problem


def _decode(
    host: Host, prompt: PrunedPrompt, answer: GenerationResult, clock: Clock,
    decoding: dict[str, Any],
) -> Iterator[GenerationResult]:  # fmt: skip
    """mlx-vlm's pieces, one for each token. It repeats the last one when it says why it ended, so
    the last that may come is held back until then."""
    from mlx_vlm.generate import stream_generate as decode
    from mlx_vlm.models.cache import make_prompt_cache

    cache = prompt.cache or make_prompt_cache(host.language)
    arguments = {"prompt_cache": cache, **decoding, **prompt.arguments}
    ids: list[int] = []
    held = None
    for piece in decode(host.model, host.processor, "", **arguments):
        if not answer.ttft_ms:
            clock.lap(TOGETHER if TOGETHER in clock.ms else "prefill")
            ttft, size = (
                clock.ttft(),
                prompt.cache_bytes or prompt_cache_bytes(cache, prompt.length),
            )
            tps = 1000 * prompt.length / ttft["total"]
            answer = replace(answer, ttft_ms=ttft, prompt_tps=tps, cache_bytes=size)
        reason = piece.finish_reason
        ids += [piece.token] if reason is None else []
        now = replace(
            answer,
            text=piece.text if held is None else held.text + piece.text,
            token=piece.token,
            token_ids=list(ids),
            generation_tokens=piece.generation_tokens,
            generation_tps=piece.generation_tps,
            peak_memory=piece.peak_memory,
            finish_reason=reason,
        )
        if reason is None and piece.generation_tokens == decoding["max_tokens"]:
            held = now
        else:
            yield now
