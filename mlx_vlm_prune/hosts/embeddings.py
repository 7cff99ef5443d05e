"""`get_input_embeddings` of a model that prunes: the same question, answered with rows gone.

Shapes: B prompts, L rows of the longest, l rows left of one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakSet

import mlx.core as mx

from ..checkpoints.errors import UserError
from ..laps import Clock
from ..pruners import Pipeline
from ..pruners.contract import Policy
from .batches import taken_apart
from .host import Host
from .prompt import PrunedPrompt, add_text, prune_prompt, view_budgets
from .report import Report
from .rows import deep_rows, laid_out
from .tower_cache import TowerCache
from .views import Inputs, View

UNREAD = ("vision_cache", "_image_key")  # caches of whole features that others would read
OTHERS = ("pixel_values_videos", "input_features", "audio_values")
PREPARED = ("cached_image_features", "inputs_embeds", "position_ids")  # by the caller
OURS = ("position_ids", "rope_deltas", "deepstack_visual_embeds")  # better than what it derives
LAID = ("position_ids", "visual_pos_masks", "deepstack_visual_embeds")  # beside the embeddings


@dataclass
class PrunedEmbeddings:
    """How a model prunes; called as its `get_input_embeddings` is."""

    host: Host
    stock: Any  # the model's own `get_input_embeddings`
    pipeline: Pipeline
    keep_ratio: float | None
    keep_tokens: int | None
    policy: Policy
    whole_videos: bool  # are prompts with videos or sound read whole, and not refused?
    reads_whole: bool  # is a prompt not to be read in pieces, since its rows see those behind them?
    busy: bool = False  # are the language model's own functions called from here?
    caches: WeakSet[Any] = field(default_factory=WeakSet)  # the first layer's of each request

    def __post_init__(self) -> None:
        self.report = Report(self.pipeline.name, self.policy)
        self.tower_cache = TowerCache(self.host, self.pipeline)

    def __call__(
        self, input_ids: Any = None, pixel_values: Any = None, mask: Any = None, **extra: Any
    ) -> Any:
        """mlx-vlm's features of B prompts. Raises UserError for what is no image."""
        has_others = any(extra.get(name) is not None for name in OTHERS)
        if has_others and not self.whole_videos:
            raise UserError("only images are pruned: videos and sound go outside the block")
        for name in PREPARED:
            if extra.get(name) is not None:
                raise UserError(f"a model that prunes takes no {name}: which tokens stay is judged"
                                " by the images, and where they stand follows")  # fmt: skip
        extra = {name: value for name, value in extra.items() if name not in UNREAD}
        with self.working():
            if pixel_values is None or has_others:
                return self._whole(self.stock(input_ids, pixel_values, mask=mask, **extra))
            return self._pruned(input_ids, pixel_values, mask, extra)

    @contextmanager
    def working(self) -> Iterator[None]:
        """While the language model's own functions are called from here."""
        self.busy = True
        try:
            yield
        finally:
            self.busy = False

    def _pruned(self, ids_BL: mx.array, pixels: Any, mask_BL: Any, extra: dict[str, Any]) -> Any:
        misses, parts = self.tower_cache.misses, []
        with Clock().running() as clock:
            prompts = taken_apart(self.host, ids_BL, mask_BL, pixels, extra, self.tower_cache)
            remembered = self.tower_cache.misses == misses
            for begin, inputs, views in prompts:
                prompt, features = self._prompt(inputs, views)
                if views:
                    self.report.add(prompt, clock.ms, remembered)
                    clock.ms = dict.fromkeys(clock.ms, 0.0)
                parts.append((range(begin, begin + len(inputs.ids)), prompt.kept_rows, features))
        first = parts[0][2]
        if self.host.placeholders != "token":  # mlx-vlm's rows and ids differ there anyway
            return first
        laid = [laid_out(ids_BL.shape[1], *part, len(self.host.deepstack)) for part in parts]
        batch: dict[str, Any] = dict.fromkeys(LAID)
        for name in laid[0]:
            batch[name] = mx.stack([one[name] for one in laid], axis=int(name == "position_ids"))
        if first.rope_deltas is not None:
            batch["rope_deltas"] = mx.concatenate([f.rope_deltas for _, _, f in parts])
        return replace(first, **batch)

    def _prompt(self, inputs: Inputs, views: list[View]) -> tuple[PrunedPrompt, Any]:
        """What stays of a prompt, and mlx-vlm's features of that."""
        if self.keep_tokens is not None and not self.host.knows_images(inputs, views):
            raise UserError(
                f"prompts of a {self.host.kind} model do not say which crops are of"
                " one image: give keep_ratio in place of keep_tokens"
            )
        views = add_text(self.host, inputs, views, self.pipeline)
        budgets = view_budgets(views, self.keep_ratio, self.keep_tokens, self.pipeline)
        prompt = prune_prompt(self.host, inputs, views, self.pipeline, budgets, self.policy)
        arguments = dict(prompt.arguments)
        ours = {name: arguments.pop(name) for name in OURS if name in arguments}
        ids_1l, pixels = arguments.pop("input_ids"), arguments.pop("pixel_values", None)
        features = self.stock(ids_1l, pixels, **arguments)
        return prompt, replace(features, **ours, attention_mask_4d=None)  # which nothing reads

    def _whole(self, features: Any) -> Any:
        """Prompts of which nothing goes, laid out as their neighbours in a batch are."""
        if not self.host.deepstack:
            return features
        x_BLD, visual_BL = features.inputs_embeds, features.visual_pos_masks
        if visual_BL is None:
            visual_BL = mx.zeros(x_BLD.shape[:2], mx.bool_)
        deep = features.deepstack_visual_embeds
        deep_RYD = deep_rows(visual_BL.flatten(), deep, len(self.host.deepstack), x_BLD)
        deep_BLYD = deep_RYD.reshape(*x_BLD.shape[:2], *deep_RYD.shape[1:])
        return replace(features, visual_pos_masks=visual_BL, deepstack_visual_embeds=deep_BLYD)
