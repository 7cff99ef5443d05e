"""`auto` for a loaded model, ours or mlx-vlm's, and for a folder of mlx-vlm's."""

import logging
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from PIL import Image

from ..checkpoints.errors import UserError
from ..generation.request import Request
from ..generation.result import GenerationResponse, GenerationResult
from ..generation.stream import default_pruner, pipeline_for
from ..inputs.budget import budget, check_budget, tokens_for
from ..inputs.image import open_image
from ..machine.clock import Timings
from ..models.adapters import adapters
from ..models.vlm import VLM
from ..pruners import AUTO, Pipeline
from ..pruners.auto import AutoChoice, ModelFacts, choose, choose_for_clip
from .compatibility import check_cache_options, check_pipeline
from .families import host_of
from .families.llava import CLIP
from .families.pruner_defaults import plan_for_host
from .host import ADAPTERS, Host
from .stream import cache_options

logger = logging.getLogger("mlx_vlm_prune")
WITH_CLIP = ("llava", "llava_next")  # families whose tower is CLIP or another


@dataclass(frozen=True)
class Why:
    """The line that says why a method was chosen, and the milliseconds that choosing took."""

    line: str
    ms: float


def is_auto(model: Any, request: Request) -> bool:
    """Is a method to be chosen: by name, or since there is a budget and no method?"""
    if request.pruner is not None:
        return isinstance(request.pruner, str) and request.pruner == AUTO
    has_budget = request.keep_ratio is not None or request.keep_tokens is not None
    return has_budget and default_pruner(model) == "none"


def with_method(
    model: Any, processor: Any, request: Request, before: Why | None = None
) -> tuple[Request, Why | None]:
    """The request with a method in place of `auto`, and why that one; as it is where it names a
    method or has no budget. The line is logged unless it is the one `before`.

    Raises UserError.
    """
    if not is_auto(model, request):
        return request, None
    check_budget(request.keep_ratio, request.keep_tokens)
    if request.video is not None:
        choice = choose_for_clip(request.keep_ratio, request.keep_tokens)
        if not before or choice.line != before.line:
            logger.info(choice.line)
        return replace(request, **choice.options), Why(choice.line, 0.0)
    if not request.images:
        return replace(request, pruner="none", keep_ratio=None, keep_tokens=None), None
    prompt = request.prompt if request.caution else None
    start, opened = time.perf_counter(), list[Any]()
    facts = facts_of(model, processor, request=request)

    def pictures() -> list[Any]:
        opened[:] = [open_image(source, request.pixel_limit) for source in request.images]
        return opened

    choice = choose(facts, request.keep_ratio, request.keep_tokens, prompt, pictures)
    if not before or choice.line != before.line:
        logger.info(choice.line)
    if opened:  # no file is decoded twice
        pairs = zip(request.images, opened, strict=True)
        images = [given if isinstance(given, Image.Image) else image for given, image in pairs]
        request = replace(request, images=images)
    ms = 1000 * (time.perf_counter() - start)
    return replace(request, **choice.options), Why(choice.line, ms)


def noting(
    pieces: Iterator[GenerationResponse], why: Why | None
) -> Generator[GenerationResponse, None, None]:
    """The pieces of an answer, the last of them with a result as of `noted`."""
    try:
        for piece in pieces:
            if why and piece.result:
                piece = replace(piece, result=noted(piece.result, why))
            yield piece
    finally:
        if isinstance(pieces, Generator):
            pieces.close()


def noted(result: GenerationResult, why: Why | None) -> GenerationResult:
    """A result that says why its method was chosen, and counts the time of that as a part of what
    is done before the tower; as it is without."""
    if why is None:
        return result
    times, ms = result.ttft_ms, why.ms
    longer: Timings = {**times, "image": times["image"] + ms, "total": times["total"] + ms}
    return replace(result, auto=why.line, ttft_ms=longer)


def choose_method(
    model: Any, processor: Any, keep_ratio: float | None, keep_tokens: int | None, *,
    is_batched: bool = False, is_timed: bool = True,
) -> AutoChoice:  # fmt: skip
    """The choice for a budget, without a prompt, which is logged; as `facts_of` and `choose`."""
    facts = facts_of(model, processor, is_batched)
    choice = choose(facts, keep_ratio, keep_tokens, is_timed=is_timed)
    logger.info(choice.line)
    return choice


def facts_of(
    model: Any, processor: Any = None, is_batched: bool = False, request: Request | None = None
) -> ModelFacts:
    """What is known of a model. What several prompts at once cannot have, a method between the
    layers of a model of mlx-vlm's, is left out where `is_batched`; and so is what cannot be with
    the positions and the cache of a `request` to one of these. Raises UserError for such options.
    """
    if isinstance(model, VLM):
        return _facts_of_ours(model, processor)
    host = host_of(model, processor)
    is_changed = getattr(model, ADAPTERS, None) is not None
    place = None if is_changed else getattr(model, "model_path", None)
    vision = getattr(model.config, "vision_config", None)
    return ModelFacts(
        host.kind, place and Path(place), has_cls(host.kind, getattr(vision, "model_type", None)),
        len(host.language.layers), None, _can_host(host, is_batched, request),
        host.embed(mx.array([0])).dtype,
    )  # fmt: skip


def facts_of_folder(
    folder: Path, config: Mapping[str, Any], check: Callable[[str], Any]
) -> ModelFacts:
    """What a folder of mlx-vlm's says of its model; `check` raises UserError for a method that
    cannot be."""
    vision, text = (config.get(name) or {} for name in ("vision_config", "text_config"))
    sizes = {**config, **(text if isinstance(text, Mapping) else {})}
    layers = sizes.get("num_hidden_layers")
    tower = vision.get("model_type") if isinstance(vision, Mapping) else None
    kind = str(config["model_type"])

    def can(spec: str, share: float | None) -> bool:
        try:
            return not _has_number(check(spec))
        except UserError:
            return False

    depth = layers if isinstance(layers, int) else 0
    return ModelFacts(kind, folder, has_cls(kind, tower), depth, None, can)


def has_cls(kind: str, tower: str | None) -> bool:
    """Has a family's tower a CLS token? `tower` is the tower's model_type, CLIP without one."""
    return kind == "internvl_chat" or (kind in WITH_CLIP and (tower or CLIP) == CLIP)


def _facts_of_ours(model: VLM, processor: Any) -> ModelFacts:
    is_changed = next(adapters(model), None) is not None
    folder = None if is_changed else getattr(processor, "folder", None)
    name, depth = getattr(processor, "name", "own"), model.config.text.num_hidden_layers

    def can(spec: str, share: float | None) -> bool:
        try:
            pipeline = pipeline_for(model, spec)
            model.language.check(pipeline)
            _check_number(pipeline, model.N, tokens_for(model.N, share or 1), depth)
        except UserError:
            return False
        return not any(step.has_dynamic_budget for step in pipeline.steps)

    return ModelFacts(name, folder, model.tower.has_cls, depth, model.N, can, model.dtype)


def _check_number(pipeline: Pipeline, N: int, K: int, layers: int) -> None:
    """Raises UserError where a method cannot keep K of N tokens."""
    budget(N, None, K, pipeline)
    if (step := pipeline.decoder) and K < N:
        step.call(step.method.schedule, layers, pipeline.budgets(N, K).before_last, K)


def _can_host(
    host: Host, is_batched: bool, request: Request | None
) -> Callable[[str, float | None], bool]:
    positions = request.positions if request else None
    of_cache = cache_options(request.given_host_options) if request else {}

    def can(spec: str, share: float | None) -> bool:
        try:
            pipeline = plan_for_host(host, spec)
            check_pipeline(host, pipeline, positions)
            check_cache_options(host, pipeline, of_cache)
        except UserError:
            return False
        return not _has_number(pipeline) and not (is_batched and pipeline.decoder)

    return can


def _has_number(pipeline: Pipeline) -> bool:
    """Does a method say itself, or for each image, how many tokens stay?"""
    is_dynamic = any(step.has_dynamic_budget for step in pipeline.steps)
    return is_dynamic or pipeline.trained_tokens is not None or pipeline.own_budget(576) is not None
