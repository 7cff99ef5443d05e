"""The token loop of a model of mlx-vlm's: its own, with our figures.

Shapes: l rows of the prompt.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
from mlx.utils import tree_reduce

from ..checkpoints.errors import UserError
from ..image import MAX_PIXELS, open_image
from ..model import no_lap
from ..pruners import plan
from ..request import Request
from ..result import GenerationResult, Seen
from ..stream import Clock
from .deep import Read, read
from .families import host_of
from .host import Host, generation_stream
from .prompt import (
    PrunedPrompt,
    kept_indices,
    prepare_prompt,
    prune_prompt,
    view_budgets,
    views_of,
)
from .refusals import check, check_bits

TOGETHER = "vision and prefill"  # where nothing is pruned, timed as mlx-vlm computes it


def cache_options(
    prefill_step_size: int | None, kv_bits: float | None, quantized_kv_start: int | None
) -> dict[str, Any]:
    """mlx-vlm's own options, where they are given. Raises UserError."""
    options: dict[str, Any] = {}
    if prefill_step_size is not None:
        if prefill_step_size < 1:
            raise UserError(f"--prefill-step-size is {prefill_step_size}; it must be at least 1")
        options["prefill_step_size"] = prefill_step_size
    if kv_bits is not None:
        if not 1.5 <= kv_bits <= 8 or kv_bits == 7:
            raise UserError(f"--kv-bits is {kv_bits:g}; it must be from 1.5 to 8, and not 7")
        options["kv_bits"] = kv_bits
    if quantized_kv_start is not None:
        if quantized_kv_start < 0:
            raise UserError(f"--quantized-kv-start is {quantized_kv_start}; it must be at least 0")
        if kv_bits is None:
            raise UserError("--quantized-kv-start says from when on --kv-bits holds; give both")
        options["quantized_kv_start"] = quantized_kv_start
    return options


def resize_option(shape: Sequence[int] | None) -> tuple[int, int] | None:
    """Width and height that a picture is to fit in, from one number or two. Raises UserError."""
    if shape is None:
        return None
    if len(shape) not in (1, 2) or min(shape) < 1:
        raise UserError(
            f"--resize-shape is {' '.join(map(str, shape))}; give one or two sides, each at least 1"
        )
    if shape[0] * shape[-1] > MAX_PIXELS:
        raise UserError(
            f"--resize-shape is {' '.join(map(str, shape))}; the most is {MAX_PIXELS} pixels"
        )
    return shape[0], shape[-1]


def stream_generate(model: Any, processor: Any, asked: Request) -> Iterator[GenerationResult]:
    """Answer a prompt about images, one piece of text at a time. Raises UserError."""
    host, pipeline = host_of(model, processor), plan(asked.pruner)
    in_one_go = pipeline.name == "none" and bool(asked.images)  # a wait in between costs time
    clock = Clock(("image", TOGETHER)) if in_one_go else Clock()
    lap = no_lap if in_one_go else clock.lap
    cache = cache_options(asked.prefill_step_size, asked.kv_bits, asked.quantized_kv_start)
    sampling = {"max_tokens": asked.max_tokens, "temperature": asked.temperature}
    sampling |= {"top_p": asked.top_p, "seed": asked.seed}
    policy = check(host, pipeline, asked.positions)
    check_bits(host, pipeline, asked.kv_bits)
    opened = [open_image(source) for source in asked.images]
    size = resize_option(asked.resize_shape)
    inputs = prepare_prompt(host, asked.prompt, opened, asked.template, size)
    clock.lap("image", inputs.pixels)
    mx.reset_peak_memory()
    with host.restored():
        with generation_stream():
            views = views_of(host, inputs, pipeline, lap)
            budgets = view_budgets(views, asked.keep_ratio, asked.keep_tokens, pipeline)
            prompt = prune_prompt(host, inputs, views, pipeline, budgets, policy, lap)
            host.check_length(prompt.length)
            deep = read(host, prompt, pipeline, budgets, policy, asked.prefill_step_size, lap)
        begun = _begin(host, prompt, deep, pipeline.name, len(opened))
        if views:
            shown, grids = host.pictures(views, opened), [v.signals.grid for v in views]
            trace = [*prompt.trace, *(deep.trace if deep else [])]
            stops = [stop for stop in trace if stop.step] or trace
            begun = replace(begun, seen=Seen(shown, grids[0], stops, grids))
        pieces = _decode(host, prompt, deep, begun, clock, sampling | cache)
        yield from explained(pieces, asked.kv_bits)


def explained(
    pieces: Iterator[GenerationResult], kv_bits: float | None
) -> Iterator[GenerationResult]:
    """The pieces; where mlx-vlm cannot give the cache so few bits, UserError says so."""
    try:
        yield from pieces
    except ValueError as problem:
        if kv_bits is None or isinstance(problem, UserError):
            raise
        reason = " ".join(str(problem).split())
        raise UserError(f"--kv-bits {kv_bits:g} cannot be had of this model: {reason}") from problem


def _decode(
    host: Host, prompt: PrunedPrompt, deep: Read | None, begun: GenerationResult,
    clock: Clock, decoding: dict[str, Any],
) -> Iterator[GenerationResult]:  # fmt: skip
    """mlx-vlm's pieces, one for each token. It repeats the last one when it says why it ended, so
    the last that may come is held back until then."""
    from mlx_vlm.generate import stream_generate as decode
    from mlx_vlm.models.cache import make_prompt_cache

    cache = deep.cache if deep else make_prompt_cache(host.language)
    arguments = deep.arguments if deep else prompt.arguments
    arguments = {"prompt_cache": cache, **decoding, **arguments}
    ids: list[int] = []
    held = None
    for piece in decode(host.model, host.processor, "", **arguments):
        if not begun.ttft_ms:
            clock.lap(TOGETHER if TOGETHER in clock.ms else "prefill")
            ttft = clock.ttft()
            tps = 1000 * prompt.length / ttft["total"]
            bytes_ = deep.cache_bytes if deep else _held_bytes(cache, prompt.length)
            begun = replace(begun, ttft_ms=ttft, prompt_tps=tps, cache_bytes=bytes_)
        reason = piece.finish_reason
        ids += [piece.token] if reason is None else []
        now = replace(
            begun,
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


def _held_bytes(cache: Sequence[Any], rows: int) -> int:
    """Of the prompt's rows; the first token's may be in already."""
    total = 0.0
    for layer in cache:
        held = tree_reduce(lambda n, a: n + getattr(a, "nbytes", 0), layer.state, 0)
        total += held * min(1.0, rows / max(1, layer.offset))
    return round(total)


def _begin(
    host: Host, prompt: PrunedPrompt, deep: Read | None, pruner: str, images: int
) -> GenerationResult:
    """The figures known before decoding."""
    kept = kept_indices(prompt.views, prompt.trace[-1], images) if prompt.trace else []
    slots = sum(one.slots for one in prompt.trace[-1].kept) if prompt.trace else 0
    last = len(host.language.layers) - 1
    whole: dict[str, Any] = {"first": 0, "last": last, "visual_tokens": slots, "kept_indices": kept}
    layers = deep.layers if deep else [whole]
    held = sum(run["visual_tokens"] * (run["last"] - run["first"] + 1) for run in layers)
    return GenerationResult(
        text="", token=-1, token_ids=[], prompt_tokens=prompt.length, generation_tokens=0,
        prompt_tps=0.0, generation_tps=0.0, peak_memory=0.0, finish_reason=None,
        visual_tokens=sum(view.signals.x_BND.shape[1] for view in prompt.views),
        visual_tokens_kept=round(held / (last + 1)), kept_indices=layers[-1]["kept_indices"],
        pruner=pruner, positions=deep.positions if deep else prompt.positions, ttft_ms={},
        layers=layers if images else [],
    )  # fmt: skip
