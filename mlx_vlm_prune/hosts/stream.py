"""The token loop of a model of mlx-vlm's: its own, told in our figures.

Shapes: l rows of the prompt.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
from mlx.utils import tree_reduce
from PIL import Image

from ..checkpoints.errors import UserError
from ..generation.request import Request
from ..generation.result import GenerationResult, Seen
from ..generation.stream import Clock
from ..image import MAX_PIXELS, open_image
from ..model import Lap, no_lap
from ..prompt import IMAGE_MARK
from ..pruners import Pipeline, plan
from ..pruners.contract import Policy
from .deep import Read, read
from .families import Family
from .mlx_vlm import Told, as_it_was, budgets, chosen, family_of, pictures, see, tell
from .mlx_vlm import stream as its_stream
from .refusals import check
from .views import Inputs, View

TOGETHER = "vision and prefill"  # where nothing is pruned, timed as mlx-vlm computes it


def cache_options(
    prefill_step_size: int | None, kv_bits: float | None, quantized_kv_start: int | None
) -> dict[str, Any]:
    """mlx-vlm's own options, where they are given. Raises UserError."""
    told: dict[str, Any] = {}
    if prefill_step_size is not None:
        if prefill_step_size < 1:
            raise UserError(f"--prefill-step-size is {prefill_step_size}; it must be at least 1")
        told["prefill_step_size"] = prefill_step_size
    if kv_bits is not None:
        if not 1.5 <= kv_bits <= 8 or kv_bits == 7:
            raise UserError(f"--kv-bits is {kv_bits:g}; it must be from 1.5 to 8, and not 7")
        told["kv_bits"] = kv_bits
    if quantized_kv_start is not None:
        if quantized_kv_start < 0:
            raise UserError(f"--quantized-kv-start is {quantized_kv_start}; it must be at least 0")
        if kv_bits is None:
            raise UserError("--quantized-kv-start says from when on --kv-bits holds; give both")
        told["quantized_kv_start"] = quantized_kv_start
    return told


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
    family, pipeline = family_of(model), plan(asked.pruner)
    in_one_go = pipeline.name == "none" and bool(asked.images)  # a wait in between costs time
    clock = Clock(("image", TOGETHER)) if in_one_go else Clock()
    lap = no_lap if in_one_go else clock.lap
    cache = cache_options(asked.prefill_step_size, asked.kv_bits, asked.quantized_kv_start)
    sampling = {"max_tokens": asked.max_tokens, "temperature": asked.temperature}
    sampling |= {"top_p": asked.top_p, "seed": asked.seed}
    policy = check(model, family, pipeline, asked.positions)
    _check_bits(family, pipeline, asked.kv_bits)
    opened = [open_image(source) for source in asked.images]
    size = resize_option(asked.resize_shape)
    inputs = prepared(model, processor, asked.prompt, opened, asked.template, size)
    clock.lap("image", inputs.pixels)
    mx.reset_peak_memory()
    with as_it_was(model.language_model):
        with its_stream():
            views = see(model, inputs, pipeline, lap)
            kept = budgets(views, asked.keep_ratio, asked.keep_tokens, pipeline)
            told, deep = fewer(
                model, inputs, views, pipeline, kept, policy, asked.prefill_step_size, lap
            )
        said = _begin(told, deep, pipeline, len(opened), model)
        if views:
            shown, grids = pictures(views, processor, opened), [v.signals.grid for v in views]
            trace = [*told.trace, *(deep.trace if deep else [])]
            stops = [stop for stop in trace if stop.step] or trace
            said = replace(said, seen=Seen(shown, grids[0], stops, grids))
        pieces = _decode(model, processor, told, deep, said, clock, sampling | cache)
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
        said = " ".join(str(problem).split())
        raise UserError(f"--kv-bits {kv_bits:g} cannot be had of this model: {said}") from problem


def prepared(
    model: Any, processor: Any, prompt: str, opened: Sequence[Image.Image],
    template: Mapping[str, Any] | None = None, size: tuple[int, int] | None = None,
) -> Inputs:  # fmt: skip
    """A prompt and pictures, through mlx-vlm's chat template and the model's own processor.

    Raises UserError.
    """
    from mlx_vlm.prompt_utils import apply_chat_template

    for mark in _image_marks(model, processor):
        if mark in prompt:
            raise UserError(
                f"leave {mark} out of the prompt: in mlx-vlm models the chat template says where"
                " images go"
            )
    options = dict(template or {})
    text = apply_chat_template(processor, model.config, prompt, num_images=len(opened), **options)
    try:
        return family_of(model).prepare(model, processor, text, opened, size)
    except UserError:
        raise
    except ValueError as problem:  # mlx-vlm wraps whatever its processors raise
        said = " ".join((str(problem).strip() or type(problem).__name__).split())
        raise UserError(f"mlx-vlm cannot prepare the images: {said}") from problem


def _image_marks(model: Any, processor: Any) -> list[str]:
    """What stands for an image in a prompt: our mark, and the model's own."""
    words, config = getattr(processor, "tokenizer", processor), model.config
    ids = (getattr(config, f"image_token_{end}", None) for end in ("index", "id"))
    # FastVLM's is -200: no token at all
    told = [words.convert_ids_to_tokens(own) for own in ids if own is not None and own >= 0]
    named = [IMAGE_MARK, getattr(processor, "image_token", None), *told]
    return list(dict.fromkeys(mark for mark in named if isinstance(mark, str) and mark))


def fewer(
    model: Any, inputs: Inputs, views: list[View], pipeline: Pipeline, kept: Sequence[int],
    policy: Policy, piece: int | None, lap: Lap,
) -> tuple[Told, Read | None]:  # fmt: skip
    """The prompt with `kept` tokens of each view; read already where rows leave between layers.

    Raises UserError.
    """
    told = tell(model, inputs, views, pipeline, kept, "keep" if pipeline.decoder else policy, lap)
    _check_length(model, told)
    left = told.trace[-1].kept if told.trace else []  # behind the projector
    if pipeline.decoder and any(one.slots > K for one, K in zip(left, kept, strict=True)):
        return told, read(model, inputs, told, pipeline, kept, policy, piece, lap)
    return told, None


def _check_bits(family: Family, pipeline: Pipeline, kv_bits: float | None) -> None:
    """Broken bits are another kind of cache, which cannot say that rows are gone."""
    if pipeline.decoder and family.inner.axes == 1 and kv_bits is not None and kv_bits % 1:
        raise UserError(
            f"--kv-bits is {kv_bits:g}; with {pipeline.decoder.name} a whole number can be had"
        )


def _check_length(model: Any, told: Told) -> None:
    longest = getattr(model.config.text_config, "max_position_embeddings", None)
    if longest and told.rows > longest:
        raise UserError(f"the prompt has {told.rows} tokens; the model reads up to {longest}")


def _decode(
    model: Any, processor: Any, told: Told, deep: Read | None, said: GenerationResult,
    clock: Clock, decoding: dict[str, Any],
) -> Iterator[GenerationResult]:  # fmt: skip
    """mlx-vlm's pieces, one for each token. It repeats the last one when it says why it ended, so
    the last that may come is held back until then."""
    from mlx_vlm.generate import stream_generate as decode
    from mlx_vlm.models.cache import make_prompt_cache

    cache = deep.cache if deep else make_prompt_cache(model.language_model)
    arguments = deep.arguments if deep else told.arguments
    ids: list[int] = []
    held = None
    for piece in decode(model, processor, "", prompt_cache=cache, **decoding, **arguments):
        if not said.ttft_ms:
            clock.lap(TOGETHER if TOGETHER in clock.ms else "prefill")
            ttft = clock.ttft()
            tps = 1000 * told.rows / ttft["total"]
            bytes_ = deep.cache_bytes if deep else _held_bytes(cache, told.rows)
            said = replace(said, ttft_ms=ttft, prompt_tps=tps, cache_bytes=bytes_)
        reason = piece.finish_reason
        ids += [piece.token] if reason is None else []
        now = replace(
            said,
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
    told: Told, deep: Read | None, pipeline: Pipeline, images: int, model: Any
) -> GenerationResult:
    """The figures known before decoding."""
    kept = chosen(told.views, told.trace[-1], images) if told.trace else []
    slots = sum(one.slots for one in told.trace[-1].kept) if told.trace else 0
    last = len(model.language_model.layers) - 1
    whole: dict[str, Any] = {"first": 0, "last": last, "visual_tokens": slots, "kept_indices": kept}
    layers = deep.layers if deep else [whole]
    held = sum(run["visual_tokens"] * (run["last"] - run["first"] + 1) for run in layers)
    return GenerationResult(
        text="", token=-1, token_ids=[], prompt_tokens=told.rows, generation_tokens=0,
        prompt_tps=0.0, generation_tps=0.0, peak_memory=0.0, finish_reason=None,
        visual_tokens=sum(view.signals.x_BND.shape[1] for view in told.views),
        visual_tokens_kept=round(held / (last + 1)), kept_indices=layers[-1]["kept_indices"],
        pruner=pipeline.name, positions=deep.positions if deep else told.positions, ttft_ms={},
        layers=layers if images else [],
    )  # fmt: skip
