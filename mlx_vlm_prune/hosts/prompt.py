"""A prompt with fewer visual tokens: encode, prune, project, splice.

The tower and the projector are run from here, on the instance as it stands. mlx-vlm's own
`stream_generate` decodes: it gets ids without the dropped placeholders, the embeddings of the
kept tokens, and positions. It is the interface it has for callers that prepare their own tensors;
nothing is patched, and what a request leaves on the instance is taken back.

Shapes: N visual tokens of a view, K kept, L rows of the whole prompt, l that stay, T words,
D features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from ..checkpoints.errors import UserError
from ..machine.clock import end_part
from ..models.pruning import ImageBatch, prune
from ..pruners import Pipeline, Stage, StepBudgets
from ..pruners.budget import budget
from ..pruners.contract import Policy, Reduction
from ..pruners.trace import ReductionStep, Trace
from .host import Host
from .prepared_inputs import PreparedInputs
from .views import View


@dataclass(frozen=True)
class PrunedPrompt:
    """A prompt with fewer visual tokens, as mlx-vlm's `stream_generate` takes it.

    `trace` has a reduction for every view; `positions` is the policy that holds. Where the prompt
    was read already, but for its last row, `cache` has its rows and `cache_bytes` their size.
    """

    inputs: PreparedInputs
    views: list[View]
    arguments: dict[str, Any]
    kept_rows: Sequence[int]  # of the whole prompt
    length: int  # rows that the language model reads
    trace: Trace
    positions: Policy
    cache: list[Any] | None = None
    cache_bytes: int | None = None


def prepare_prompt(
    host: Host,
    prompt: str,
    images: Sequence[Image.Image],
    template: Mapping[str, Any] | None = None,
    resize: tuple[int, int] | None = None,
) -> PreparedInputs:
    """A prompt and images, through mlx-vlm's chat template and the model's own processor.

    Raises UserError.
    """
    from mlx_vlm.prompt_utils import apply_chat_template

    for mark in host.image_marks:
        if mark in prompt:
            raise UserError(
                f"leave {mark} out of the prompt: in mlx-vlm models the chat template says where"
                " images go"
            )
    options = dict(template or {})
    text = apply_chat_template(
        host.processor, host.model.config, prompt, num_images=len(images), **options
    )
    try:
        return host.prepare(text, images, resize)
    except UserError:
        raise
    except ValueError as problem:  # mlx-vlm wraps whatever its processors raise
        reason = " ".join((str(problem).strip() or type(problem).__name__).split())
        raise UserError(f"mlx-vlm cannot prepare the images: {reason}") from problem


def encode_images_and_text(host: Host, inputs: PreparedInputs, pipeline: Pipeline) -> list[View]:
    """The images as the tower sees them, with what the pipeline needs of tower and prompt."""
    return add_text(host, inputs, encode_images(host, inputs, pipeline), pipeline)


def encode_images(host: Host, inputs: PreparedInputs, pipeline: Pipeline) -> list[View]:
    """The tower's part of that, which knows nothing of the prompt."""
    if inputs.pixels is None:
        return []
    if inputs.images > 1 and host.why_one_image:
        raise UserError(f"a {host.kind} model reads one image here: {host.why_one_image}")
    layers = host.depth
    views = host.encode_images(inputs, pipeline.signal_layers(layers) if layers else {})
    end_part("vision", [a for view in views for a in (view.signals.x_BND, *view.deepstack)])
    return views


def add_text(
    host: Host, inputs: PreparedInputs, views: list[View], pipeline: Pipeline
) -> list[View]:
    """The views with the embeddings of the prompt's words, where the pipeline needs them."""
    if not pipeline.needs_signal("text"):
        return views
    words = [token for token in inputs.ids if token != host.image_token_id(inputs)]
    text_1TD = host.embed(mx.array([words or [0]]))
    real_1T = mx.full((1, text_1TD.shape[1]), bool(words))
    return [
        replace(view, signals=view.signals.replace(text_BTD=text_1TD, text_real_BT=real_1T))
        for view in views
    ]


def budgets_by_view(
    views: Sequence[View], keep_ratio: float | None, keep_tokens: int | None, pipeline: Pipeline
) -> list[int]:
    """Each view's K: an image's budget, shared among its crops."""
    budgets: list[int] = []
    for image in range(1 + max((view.image for view in views), default=-1)):
        sizes = [view.signals.x_BND.shape[1] for view in views if view.image == image]
        budgets += share_budget(budget(sum(sizes), keep_ratio, keep_tokens, pipeline), sizes)
    return budgets


def share_budget(K: int, sizes: Sequence[int]) -> list[int]:
    """An image's K among its views, in proportion to their N; each gets one at least."""
    ends = np.cumsum([0, *sizes])
    parts = [int(K * b // ends[-1] - K * a // ends[-1]) for a, b in pairwise(ends)]
    if min(parts) < 1:
        raise UserError(f"an image in {len(sizes)} crops cannot keep {K} visual tokens: keep more")
    return parts


def prune_prompt(
    host: Host,
    inputs: PreparedInputs,
    views: list[View],
    pipeline: Pipeline,
    budgets: Sequence[int],
    policy: Policy,
) -> PrunedPrompt:
    """Prune, project and splice; `budgets` are each view's K.

    Rows that are to leave between the language model's layers are all there, at their positions.
    """
    policy = "keep" if pipeline.decoder else policy
    if inputs.pixels is None:
        rows = range(len(inputs.ids))
        arguments = row_arguments(host, inputs, rows, policy)
        return PrunedPrompt(inputs, [], arguments, rows, len(rows), Trace([], [], []), policy)
    batches = [ImageBatch.of(view.signals) for view in views]
    sizes = [view.signals.x_BND.shape[1] for view in views]
    by_view = [pipeline.budgets(N, K) for N, K in zip(sizes, budgets, strict=True)]
    steps = [ReductionStep("", 0, [batch.kept for batch in batches])]
    batches, features = _prune(batches, by_view, Stage.FEATURES)  # prune
    batches = _project(host, batches)  # project
    batches, projected = _prune(batches, by_view, Stage.PROJECTED)
    trace = Trace([*steps, *features, *projected], sizes, [view.image for view in views])
    policy = trace.policy(policy)
    kept_at = kept_rows(host, inputs, sizes, [batch.kept for batch in batches])  # splice
    arguments = row_arguments(host, inputs, kept_at, policy)
    arguments |= _visual_arguments(host, inputs, views, batches)
    length = len(kept_at)
    if host.placeholder_unit != "token":
        words = [i for i in kept_at if inputs.ids[i] != host.image_token_id(inputs)]
        length = len(words) + sum(map(len, arguments["cached_image_features"]))
    return PrunedPrompt(inputs, views, arguments, kept_at, length, trace, policy)


def _prune(
    batches: list[ImageBatch], budgets: Sequence[StepBudgets], stage: Stage
) -> tuple[list[ImageBatch], list[ReductionStep]]:
    """What the methods of a stage leave of each view, which may differ in size."""
    done = [prune([batch], steps, stage) for batch, steps in zip(batches, budgets, strict=True)]
    by_step = zip(*(steps for _, steps in done), strict=True)
    together = [
        ReductionStep(same[0].name, 0, [r for step in same for r in step.reductions])
        for same in by_step
    ]
    return [batch for parts, _ in done for batch in parts], together


def _project(host: Host, batches: list[ImageBatch]) -> list[ImageBatch]:
    """All views in one product."""
    parts = [batch.signals.x_BND for batch in batches]
    ends = accumulate([0, *(part.shape[1] for part in parts)])
    x_1TD = host.project(mx.concatenate(parts, axis=1) if len(parts) > 1 else parts[0])
    return [
        replace(batch, signals=batch.signals.replace(x_BND=x_1TD[:, a:b]))
        for batch, (a, b) in zip(batches, pairwise(ends), strict=True)
    ]


def _visual_arguments(
    host: Host, inputs: PreparedInputs, views: Sequence[View], batches: Sequence[ImageBatch]
) -> dict[str, Any]:
    """The arguments that hand over the visual tokens."""
    x = [batch.signals.x_BND[0] for batch in batches]
    is_full = sum(map(len, x)) == sum(view.signals.x_BND.shape[1] for view in views)
    arguments = host.join_embeddings(x, is_full)
    pairs = zip(views, batches, strict=True)
    deep = [[batch.kept.apply(y)[0] for y in view.deepstack] for view, batch in pairs]
    if deep[0]:  # with features from outside, mlx-vlm 0.7 would leave this out
        by_layer = zip(*deep, strict=True)
        arguments["deepstack_visual_embeds"] = [mx.concatenate(list(y)) for y in by_layer]
    arguments["pixel_values"] = inputs.pixels  # unread, but without it no image is looked for
    if "image_token_index" in inputs.extra:
        arguments["image_token_index"] = inputs.extra["image_token_index"]
    return arguments


def kept_rows(
    host: Host, inputs: PreparedInputs, sizes: Sequence[int], kept: Sequence[Reduction]
) -> list[int]:
    """Which rows stay: all words, and the placeholder of each slot's own token; slots without
    one take the first. `sizes` are the views' N.

    Raises UserError where the placeholders are not as many as the visual tokens.
    """
    placeholder, N = host.image_token_id(inputs), sum(sizes)
    room = inputs.ids.count(placeholder)
    if host.placeholder_unit == "token" and room != N:
        raise UserError(
            f"the prompt has room for {room} visual tokens and the images have {N};"
            " an image's placeholder in the text counts, too"
        )
    if host.placeholder_unit == "token" and sum(one.slots for one in kept) == N:
        return list(range(len(inputs.ids)))
    stays_L = np.array(inputs.ids) != placeholder
    at = np.flatnonzero(~stays_L)
    if host.placeholder_unit != "token":
        stays_L[at if host.placeholder_unit == "image" else at[:1]] = True
        return np.flatnonzero(stays_L).tolist()
    for rows, one in zip(np.split(at, np.cumsum(sizes)[:-1]), kept, strict=True):
        if one.slots < len(rows):
            rows = rows[: one.slots] if one.index_BK is None else rows[np.array(one.index_BK[0])]
        stays_L[rows] = True
    return np.flatnonzero(stays_L).tolist()


def row_arguments(
    host: Host, inputs: PreparedInputs, rows: Sequence[int], policy: Policy
) -> dict[str, Any]:
    """The arguments that say to mlx-vlm which rows there are, and where.

    Positions of one axis count rows, and need no argument. Those of three come from the whole
    prompt, and so does what decoding adds to the number of rows (`rope_deltas`); where all rows
    stay, mlx-vlm finds both.
    """
    ids_1L = mx.array(inputs.ids)[None]
    arguments: dict[str, Any] = {"input_ids": ids_1L, "mask": inputs.mask_1L}
    is_full = len(rows) == len(inputs.ids)
    if not is_full:
        rows_l = mx.array(np.array(rows, np.int32))
        arguments = {name: x_1L[:, rows_l] for name, x_1L in arguments.items()}
    if host.has_mrope and policy == "renumber":
        place_l = mx.arange(len(rows), dtype=mx.int32)
        arguments["position_ids"] = mx.broadcast_to(place_l, (3, 1, len(rows)))
        arguments["rope_deltas"] = mx.zeros((1, 1), mx.int32)
    elif host.has_mrope and is_full:  # mlx-vlm's own
        arguments["image_grid_thw"] = inputs.extra.get("image_grid_thw")
    elif host.has_mrope:
        place_31L, delta_11 = host.language.get_rope_index(
            ids_1L, inputs.extra.get("image_grid_thw"), None, inputs.mask_1L
        )
        arguments["position_ids"] = place_31L[..., rows_l]
        arguments["rope_deltas"] = delta_11 + (len(inputs.ids) - len(rows))
    return arguments
