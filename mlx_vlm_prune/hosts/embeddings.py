"""`get_input_embeddings` of a model that prunes: the same question, answered with rows gone.

Shapes: B prompts, L rows of the longest, l rows left of one, Y layers that DeepStack adds to.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import numpy as np

from ..checkpoints.errors import UserError
from ..laps import Clock
from ..pruners import Pipeline
from ..pruners.contract import Policy
from .batches import taken_apart
from .fewer import Laid, laid_out
from .host import Host
from .memory import Memory, key_of
from .prompt import (
    PrunedPrompt,
    add_text,
    encode_images,
    prune_prompt,
    view_budgets,
)
from .report import Prompt, Report
from .views import Inputs, View

UNREAD = ("vision_cache", "_image_key")  # caches of whole features that others would read
OTHERS = ("pixel_values_videos", "input_features", "audio_values")
PREPARED = ("cached_image_features", "inputs_embeds", "position_ids")  # by the caller
OURS = ("position_ids", "rope_deltas", "deepstack_visual_embeds")  # better than what it derives


@dataclass
class Embeddings:
    """How a model prunes, and what it has seen; called as `get_input_embeddings` is."""

    host: Host
    stock: Any  # the model's own `get_input_embeddings`
    pipeline: Pipeline
    keep_ratio: float | None
    keep_tokens: int | None
    policy: Policy
    report: Report
    whole_videos: bool = False  # are prompts with videos or sound read whole, and not refused?
    memory: Memory = field(default_factory=Memory)
    busy: bool = False  # are the language model's own functions called from here?

    def __call__(
        self, input_ids: Any = None, pixel_values: Any = None, mask: Any = None, **told: Any
    ) -> Any:
        """mlx-vlm's features of B prompts. Raises UserError for what is no image."""
        has_others = any(told.get(name) is not None for name in OTHERS)
        if has_others and not self.whole_videos:
            raise UserError("only images are pruned: videos and sound go outside the block")
        for name in PREPARED:
            if told.get(name) is not None:
                raise UserError(f"a model that prunes takes no {name}: which tokens stay is judged"
                                " by the images, and where they stand follows")  # fmt: skip
        told = {name: value for name, value in told.items() if name not in UNREAD}
        with self.working():
            if pixel_values is None or has_others:
                return self._whole(self.stock(input_ids, pixel_values, mask=mask, **told))
            return self._answer(input_ids, pixel_values, mask, told)

    @contextmanager
    def working(self) -> Iterator[None]:
        """While the language model's own functions are called from here."""
        self.busy = True
        try:
            yield
        finally:
            self.busy = False

    def _answer(self, ids_BL: mx.array, pixels: Any, mask_BL: Any, told: dict[str, Any]) -> Any:
        clock, seen = Clock(), _Seen()

        def see(inputs: Inputs) -> list[View]:
            return self._see(inputs, clock, seen)

        with clock.running():
            prompts = taken_apart(self.host, ids_BL, mask_BL, pixels, told, see)
            rows = [
                (at, *self._prompt(inputs, views, clock, seen)) for at, inputs, views in prompts
            ]
        if self.host.placeholders != "token":  # mlx-vlm's rows and ids differ there anyway
            return rows[0][2]
        return self._side_by_side(rows, [len(i.ids) for _, i, _ in prompts], ids_BL.shape[1])

    def _see(self, inputs: Inputs, clock: Clock, seen: "_Seen") -> list[View]:
        key = key_of(inputs)
        views = self.memory.recall(key)
        if views is None:
            seen.all_before = False
            views = encode_images(self.host, inputs, self.pipeline)
            self.memory.keep(key, views)
        return views

    def _prompt(
        self, inputs: Inputs, views: list[View], clock: Clock, seen: "_Seen"
    ) -> tuple[PrunedPrompt, Any]:
        """What stays of a prompt, and mlx-vlm's features of that."""
        if self.keep_tokens is not None and not self.host.knows_images(inputs, views):
            raise UserError(
                f"prompts of a {self.host.kind} model do not say which crops are of"
                " one image: give keep_ratio in place of keep_tokens"
            )
        views = add_text(self.host, inputs, views, self.pipeline)
        budgets = view_budgets(views, self.keep_ratio, self.keep_tokens, self.pipeline)
        prompt = prune_prompt(self.host, inputs, views, self.pipeline, budgets, self.policy)
        if views:
            self._report(prompt, seen.since(clock), seen.all_before)
        given = dict(prompt.arguments)
        ours = {name: given.pop(name) for name in OURS if name in given}
        ids_1l, pixels = given.pop("input_ids"), given.pop("pixel_values", None)
        found = self.stock(ids_1l, pixels, **given)
        return prompt, replace(found, **ours, attention_mask_4d=None)  # which nothing there reads

    def _report(self, prompt: PrunedPrompt, ms: dict[str, float], seen_before: bool) -> None:
        trace, images = prompt.trace, prompt.trace.image_count
        total, kept = [0] * images, [0] * images
        for view, one in zip(prompt.views, trace.steps[-1].reductions, strict=True):
            total[view.image] += view.signals.x_BND.shape[1]
            kept[view.image] += one.slots
        seconds = {part: ms[part] / 1000 for part in ("vision", "pruner")}
        whole = len(prompt.inputs.ids)
        if self.host.placeholders != "token":
            whole = prompt.length + sum(total) - sum(kept)
        indices = [trace.kept(image) for image in range(images)]
        self.report.add(Prompt(total, kept, indices, (whole, prompt.length), seconds, seen_before))

    def _whole(self, features: Any) -> Any:
        """Prompts of which nothing goes, as their neighbours in a batch are told."""
        if not self._deep:
            return features
        B, L, D = features.inputs_embeds.shape
        visual_BL, deep_VYD = features.visual_pos_masks, features.deepstack_visual_embeds
        deep_RYD = mx.zeros((B * L, self._deep, D), features.inputs_embeds.dtype)
        if visual_BL is None:
            visual_BL = mx.zeros((B, L), mx.bool_)
        if deep_VYD is not None:
            rows = mx.array(np.flatnonzero(np.array(visual_BL)).astype(np.int32))
            deep_RYD[rows] = mx.stack(list(deep_VYD), axis=1).astype(deep_RYD.dtype)
        return replace(
            features,
            visual_pos_masks=visual_BL,
            deepstack_visual_embeds=deep_RYD.reshape(B, L, self._deep, D),
        )

    @property
    def _deep(self) -> int:
        """Layers that DeepStack adds to."""
        tower = getattr(self.host.model, "vision_tower", None)
        return len(getattr(tower, "deepstack_visual_indexes", ()))

    def _side_by_side(
        self, rows: Sequence[tuple[int, PrunedPrompt, Any]], lengths: Sequence[int], L: int
    ) -> Any:
        """The prompts in their padded rows."""
        laid = [
            self._laid(found, prompt, at, length, L)
            for (at, prompt, found), length in zip(rows, lengths, strict=True)
        ]
        first = rows[0][2]
        deltas = [found.rope_deltas for _, _, found in rows]
        return replace(
            first,
            inputs_embeds=mx.stack([one.x_LD for one in laid]),
            position_ids=_stacked([one.place_3L for one in laid], 1),
            visual_pos_masks=_stacked([one.visual_L for one in laid]),
            deepstack_visual_embeds=_stacked([one.deep_LYD for one in laid]),
            rope_deltas=None if deltas[0] is None else mx.concatenate(deltas),
        )

    def _laid(self, found: Any, prompt: PrunedPrompt, begin: int, length: int, L: int) -> Laid:
        x_lD, place, visual_l = found.inputs_embeds[0], found.position_ids, None
        if place is not None:
            place = mx.broadcast_to(place.reshape(-1, len(x_lD)), (3, len(x_lD)))
        if self._deep:
            visual = found.visual_pos_masks
            visual_l = mx.zeros(len(x_lD), mx.bool_) if visual is None else visual[0]
        deep = found.deepstack_visual_embeds or [x_lD[:0]] * self._deep
        columns = range(begin, begin + length)
        return laid_out(L, columns, prompt.kept_rows, x_lD, place, visual_l, deep)


@dataclass
class _Seen:
    """Of one call: were all images seen before, and how much of the clock is told of already?"""

    all_before: bool = True
    told_ms: dict[str, float] = field(default_factory=dict)

    def since(self, clock: Clock) -> dict[str, float]:
        """What each part took since the last prompt of the call."""
        now, before = dict(clock.ms), self.told_ms
        self.told_ms = now
        return {part: ms - before.get(part, 0.0) for part, ms in now.items()}


def _stacked(parts: Sequence[mx.array | None], axis: int = 0) -> mx.array | None:
    """Prompts along an axis; None where a family has no such thing."""
    there = [part for part in parts if part is not None]
    assert len(there) in (0, len(parts)), "a family tells this of all prompts or of none"
    return mx.stack(there, axis) if there else None
