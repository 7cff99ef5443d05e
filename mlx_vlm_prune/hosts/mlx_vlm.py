"""Pruning in a model of mlx-vlm's: encode, prune, project, splice, decode.

The tower and the projector are run from here, on the instance as it stands. mlx-vlm's own
`stream_generate` decodes: it gets ids without the dropped placeholders, the embeddings of the
kept tokens, and positions. It is the interface it has for callers that prepare their own tensors;
nothing is patched, and what a request leaves on the instance is taken back.

Shapes: N visual tokens of a view, K kept, l rows left of the prompt, T words, D features.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from ..checkpoints.errors import UserError
from ..model import Lap, Lot, Stop, prune
from ..pruners import Pipeline, Stage, StepBudgets
from ..pruners.contract import Policy
from ..stream import budget
from .families import FAMILIES, Family
from .places import left, shortened
from .views import Inputs, View

STATE = ("_position_ids", "_rope_deltas")  # what mlx-vlm keeps of a request on the instance


@dataclass(frozen=True)
class Told:
    """A prompt with fewer visual tokens, as mlx-vlm's `stream_generate` takes it.

    `trace` has a reduction for every view; `positions` is the policy that held.
    """

    arguments: dict[str, Any]
    left: Sequence[int]  # the rows of the whole prompt that stay
    rows: int  # that the language model reads
    views: list[View]
    trace: list[Stop]
    positions: Policy


def family_of(model: Any) -> Family:
    """How this model is run; UserError where nobody has written that down."""
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if kind not in FAMILIES:
        raise UserError(f"there is no pruning in {kind} models; there is in {', '.join(FAMILIES)}")
    return FAMILIES[kind]


@contextmanager
def as_it_was(language: Any) -> Iterator[None]:
    """Take back what requests leave on the language model."""
    before = {name: getattr(language, name) for name in STATE if hasattr(language, name)}
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(language, name, value)


def stream() -> Any:
    """mlx-vlm computes on a stream of its own, and going from one to another costs time."""
    from mlx_vlm.generate import generation_stream

    return mx.stream(generation_stream)


def see(model: Any, inputs: Inputs, pipeline: Pipeline, lap: Lap) -> list[View]:
    """The tower, and what the pipeline wants to know of it and of the prompt."""
    return hear(model, inputs, look(model, inputs, pipeline, lap), pipeline)


def look(model: Any, inputs: Inputs, pipeline: Pipeline, lap: Lap) -> list[View]:
    """The tower, which knows nothing of the prompt."""
    family = family_of(model)
    if inputs.pixels is None:
        return []
    layers = family.depth(model)
    views = family.see(model, inputs, pipeline.want(layers) if layers else {})
    lap("vision", [a for view in views for a in (view.signals.x_BND, *view.deep)])
    return views


def hear(model: Any, inputs: Inputs, views: list[View], pipeline: Pipeline) -> list[View]:
    """The views with the prompt's words, where the pipeline wants them."""
    if not pipeline.wants("text"):
        return views
    family = family_of(model)
    return [replace(view, signals=_worded(model, family, inputs, view)) for view in views]


def budgets(
    views: Sequence[View], keep_ratio: float | None, keep_tokens: int | None, pipeline: Pipeline
) -> list[int]:
    """Each view's K: an image's own, shared among its crops."""
    found: list[int] = []
    for image in range(1 + max((view.image for view in views), default=-1)):
        sizes = [view.signals.x_BND.shape[1] for view in views if view.image == image]
        found += shares(budget(sum(sizes), keep_ratio, keep_tokens, pipeline), sizes)
    return found


def chosen(views: Sequence[View], last: Stop, images: int) -> list[list[int] | None]:
    """Which tokens of each image stay; None where a slot is pooled from everywhere."""
    kept: list[list[int] | None] = []
    for image in range(images):
        begin, own = 0, list[mx.array | None]()
        for view, one in zip(views, last.kept, strict=True):
            if view.image == image:
                own.append(one.index_BK if one.index_BK is None else begin + one.index_BK[0])
                begin += view.signals.x_BND.shape[1]
        told_of = [i for index in own if index is not None for i in np.array(index).tolist()]
        kept.append(None if any(i is None for i in own) else told_of)
    return kept


def tell(
    model: Any,
    inputs: Inputs,
    views: list[View],
    pipeline: Pipeline,
    budgets: Sequence[int],
    policy: Policy,
    lap: Lap,
) -> Told:
    """Prune, project and splice: `budgets` are each view's K."""
    family = family_of(model)
    if inputs.pixels is None:
        all_rows = range(len(inputs.ids))
        whole = shortened(model, family, inputs, all_rows, policy)
        return Told(whole, all_rows, len(all_rows), [], [], policy)
    lots = [Lot.of(view.signals) for view in views]
    sizes = [view.signals.x_BND.shape[1] for view in views]
    each = [pipeline.budgets(N, K) for N, K in zip(sizes, budgets, strict=True)]
    trace = [Stop("", 0, [lot.kept for lot in lots])]
    lots, seen = _prune(lots, each, Stage.FEATURES, lap)  # prune
    lots = _project(model, family, lots)  # project
    lots, more = _prune(lots, each, Stage.PROJECTED, lap)
    kept = [lot.kept for lot in lots]
    if any(one.index_BK is None for one in kept):
        policy = "renumber"  # pooled slots have no place of their own
    rows = left(inputs, family, family.image_token(model, inputs), sizes, kept)  # splice
    arguments = shortened(model, family, inputs, rows, policy)
    deep = [[one.apply(y)[0] for y in v.deep] for v, one in zip(views, kept, strict=True)]
    x, is_full = [lot.signals.x_BND[0] for lot in lots], sum(sizes) == sum(k.slots for k in kept)
    arguments |= family.hand_over(model, x, deep, is_full)
    arguments["pixel_values"] = inputs.pixels  # unread, but without it no image is looked for
    if "image_token_index" in inputs.extra:
        arguments["image_token_index"] = inputs.extra["image_token_index"]
    read = len(rows)
    if family.placeholders != "token":
        words = [i for i in rows if inputs.ids[i] != family.image_token(model, inputs)]
        read = len(words) + sum(map(len, arguments["cached_image_features"]))
    return Told(arguments, rows, read, views, [*trace, *seen, *more], policy)


def shares(K: int, sizes: Sequence[int]) -> list[int]:
    """An image's K among its views, in proportion to their N; each gets one at least."""
    ends = np.cumsum([0, *sizes])
    own = [int(K * b // ends[-1] - K * a // ends[-1]) for a, b in pairwise(ends)]
    if min(own) < 1:
        raise UserError(f"an image in {len(sizes)} crops cannot keep {K} visual tokens: keep more")
    return own


def pictures(views: Sequence[View], processor: Any, opened: Sequence[Image.Image]) -> list:
    """The views as the tower saw them, for a picture of what was kept."""
    tool = getattr(processor, "image_processor", None)
    mean, std = (getattr(tool, name, None) for name in ("image_mean", "image_std"))
    shown = []
    for view in views:
        if view.pixels_HW3 is None:
            shown.append(opened[view.image])
            continue
        pixels = np.array(view.pixels_HW3.astype(mx.float32))
        pixels = pixels * (1.0 if std is None else std) + (0.0 if mean is None else mean)
        shown.append(Image.fromarray((pixels * 255).round().clip(0, 255).astype(np.uint8)))
    return shown


def _prune(
    lots: list[Lot], budgets: Sequence[StepBudgets], stage: Stage, lap: Lap
) -> tuple[list[Lot], list[Stop]]:
    """What the methods of a stage leave of each view, which may differ in size."""
    done = [prune([lot], own, stage, lap) for lot, own in zip(lots, budgets, strict=True)]
    by_step = zip(*(stops for _, stops in done), strict=True)
    stops = [Stop(same[0].step, 0, [one for stop in same for one in stop.kept]) for same in by_step]
    return [lot for own, _ in done for lot in own], stops


def _project(model: Any, family: Family, lots: list[Lot]) -> list[Lot]:
    """All views in one product."""
    parts = [lot.signals.x_BND for lot in lots]
    ends = accumulate([0, *(part.shape[1] for part in parts)])
    x_1TD = family.project(model, mx.concatenate(parts, axis=1) if len(parts) > 1 else parts[0])
    return [
        replace(lot, signals=lot.signals.replace(x_BND=x_1TD[:, a:b]))
        for lot, (a, b) in zip(lots, pairwise(ends), strict=True)
    ]


def _worded(model: Any, family: Family, inputs: Inputs, view: View) -> Any:
    """With the embeddings of the prompt's words."""
    words = [token for token in inputs.ids if token != family.image_token(model, inputs)]
    text_1TD = family.embed(model)(mx.array([words or [0]]))
    real_1T = mx.full((1, text_1TD.shape[1]), bool(words))
    return view.signals.replace(text_BTD=text_1TD, text_real_BT=real_1T)
