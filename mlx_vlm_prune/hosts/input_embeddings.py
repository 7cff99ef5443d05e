"""What a pruned model answers to `get_input_embeddings`, which all of mlx-vlm's tools call.

Shapes: B prompts, L rows of the longest, l kept rows of one, D features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from ..checkpoints.errors import UserError
from ..machine.clock import request_clock
from ..pruners import Pipeline
from ..pruners.contract import Policy
from .batch import BatchPrompt, split_batch
from .clips import check_clip
from .dropped_rows import IS_READ, PER_ROW, deepstack_rows, to_full_length
from .host import Host
from .prefill import prefill_through_cuts, without_embeddings
from .prepared_inputs import PreparedInputs
from .prompt import ImageBudget, PrunedPrompt, ViewEncoder, add_text, prune_prompt
from .pruned_language import LanguageState
from .pruning_report import PruningReport
from .served import ServerGuard
from .tower_cache import TowerCache
from .views import View

VIDEO_PIXELS = "pixel_values_videos"
SOUNDS = ("input_features", "audio_values")
PRECOMPUTED = ("cached_image_features", "inputs_embeds", "position_ids")  # refused from a caller
FEATURE_CACHES = ("vision_cache", "_image_key")  # of unpruned features; neither read nor filled
OVERRIDES = ("position_ids", "rope_deltas", "deepstack_visual_embeds")  # not as mlx-vlm has them


@dataclass
class PrunedEmbeddings:
    """Called as the model's `get_input_embeddings`; prunes each prompt of the batch."""

    host: Host
    pipeline: Pipeline
    keep_ratio: float | None
    keep_tokens: int | None
    policy: Policy
    allow_videos: bool  # what cannot be pruned is read unpruned; without, it is refused
    state: LanguageState
    low_detail: bool = False  # each image keeps `low_detail_tokens`

    def __post_init__(self) -> None:
        self.guard: ServerGuard | None = None  # of mlx-vlm's server
        self.report = PruningReport(self.pipeline.spec, self.policy)
        self.towers = TowerCache(self.host)

    def __call__(
        self, input_ids: Any = None, pixel_values: Any = None, mask: Any = None, **extra: Any
    ) -> Any:
        """mlx-vlm's features of B prompts, at full length.

        Raises UserError for other media, and for what the caller computed: features, positions.
        """
        if self.guard:
            self.guard.watch()
        if extra.get("video_grid_thw") is not None and extra.get("image_grid_thw") is None:
            if pixel_values is not None:  # of a clip, as mlx-vlm's older callers give them
                extra[VIDEO_PIXELS], pixel_values = pixel_values, None
            if self._has_clip_alone(input_ids, extra):
                pixel_values = extra.pop(VIDEO_PIXELS)
        has_other_media = any(extra.get(name) is not None for name in (VIDEO_PIXELS, *SOUNDS))
        if has_other_media and not self.allow_videos:
            raise UserError(
                "only images, or one clip alone, are pruned: other videos and sound go outside the"
                " block"
            )
        for name in PRECOMPUTED:
            if extra.get(name) is not None:
                raise UserError(f"leave out {name}: a model that prunes computes it itself")
        extra = {name: value for name, value in extra.items() if name not in FEATURE_CACHES}
        with self.state.giving_rope_index():
            if pixel_values is None or has_other_media:
                return self._unpruned(input_ids, pixel_values, mask=mask, **extra)
            return self._pruned(input_ids, pixel_values, mask, extra)

    def _has_clip_alone(self, ids_BL: Any, extra: Mapping[str, Any]) -> bool:
        """Whether these are one prompt and one clip, without pictures, that can be pruned.

        Raises UserError where the model or a method cannot, unless it may be read unpruned.
        """
        has_sound = any(extra.get(name) is not None for name in SOUNDS)
        if extra.get(VIDEO_PIXELS) is None or has_sound:
            return False
        if len(extra["video_grid_thw"]) != 1 or len(ids_BL) != 1:
            return False
        try:
            check_clip(self.host, self.pipeline)
        except UserError:
            if self.allow_videos:
                return False
            raise
        return True

    def _unpruned(self, ids: Any, pixels: Any, **extra: Any) -> Any:
        """Features of unpruned prompts, with DeepStack's rows (B, L, Y, D) as pruned ones have."""
        features = _all_read(self.host.stock_embeddings(ids, pixels, **extra))
        if not self.host.deepstack:
            return features
        x_BLD, is_visual_BL = features.inputs_embeds, features.visual_pos_masks
        if is_visual_BL is None:
            is_visual_BL = mx.zeros(x_BLD.shape[:2], mx.bool_)
        deepstack, Y = features.deepstack_visual_embeds, len(self.host.deepstack)
        deep_BLYD = deepstack_rows(is_visual_BL.flatten(), deepstack, Y, x_BLD)
        deep_BLYD = deep_BLYD.reshape(*x_BLD.shape[:2], *deep_BLYD.shape[1:])
        return replace(features, visual_pos_masks=is_visual_BL, deepstack_visual_embeds=deep_BLYD)

    def _pruned(self, ids_BL: mx.array, pixels: Any, mask_BL: Any, extra: dict[str, Any]) -> Any:
        """Each prompt pruned, and the batch put together again."""
        self.report.read_choices()
        misses, encode, prompts, features = self.towers.misses, self._encode, [], []
        with request_clock().running() as clock:
            batch = split_batch(self.host, ids_BL, mask_BL, pixels, extra, encode)
            if self.state.reads_through_cuts and len(batch) > 1:
                raise UserError(f"{self.pipeline.spec} prunes one prompt at a time, not a batch")
            tower_skipped = self.towers.misses == misses
            for one in batch:
                prompts.append(self._prune(one))
                features.append(self._features(prompts[-1]))
                if one.views:
                    through_cuts = self._through_cuts(one, prompts[-1])
                    self.report.add(through_cuts, clock.ms, tower_skipped)
                    clock.ms = dict.fromkeys(clock.ms, 0.0)  # the next prompt's time starts here
        whole = self._whole(ids_BL.shape[1], batch, prompts, features)
        if self.pipeline.decoder and batch[0].views and through_cuts.cache:
            self.state.add_prompt(whole.attention_mask, through_cuts)
            return without_embeddings(whole)
        return whole

    def _through_cuts(self, one: BatchPrompt, prompt: PrunedPrompt) -> PrunedPrompt:
        """The prompt, read through a method between the language model's layers if there is one."""
        if self.state.reads_through_cuts:
            budgets = self._budgets(one.views)
            return prefill_through_cuts(self.host, prompt, self.pipeline, budgets, self.policy)
        return prompt

    def of_prompt(self, inputs: PreparedInputs) -> tuple[Any, PrunedPrompt | None]:
        """mlx-vlm's features of one prompt, at full length, and what was left of it; None without
        images. Raises UserError."""
        with self.state.giving_rope_index():
            if inputs.pixels is None:
                ids_1L = mx.array(inputs.ids)[None]
                return self._unpruned(ids_1L, None, mask=inputs.mask_1L, **inputs.extra), None
            one = BatchPrompt(range(len(inputs.ids)), inputs, self._encode(inputs))
            prompt = self._prune(one)
            features = self._features(prompt)
            return self._whole(len(inputs.ids), [one], [prompt], [features]), prompt

    @property
    def _encode(self) -> ViewEncoder:
        return self.towers.of(self.pipeline, self._budget)

    @property
    def _budget(self) -> ImageBudget:
        return ImageBudget(self.keep_ratio, self.keep_tokens, self.low_detail)

    def _whole(
        self, L: int, batch: Sequence[BatchPrompt], prompts: Sequence[PrunedPrompt],
        features: Sequence[Any],
    ) -> Any:  # fmt: skip
        """The features of a batch at its full length L."""
        if self.host.placeholder_unit != "token":  # ids and rows differ in mlx-vlm as well
            return features[0] if prompts[0].bias_l is not None else _all_read(features[0])
        kept_columns = [prompt.kept_rows.columns for prompt in prompts]
        return self._join(L, batch, kept_columns, features)

    def _prune(self, prompt: BatchPrompt) -> PrunedPrompt:
        inputs, views = prompt.inputs, prompt.views
        is_by_image = self.low_detail or self.keep_tokens is not None
        if is_by_image and not self.host.knows_images(inputs, views):
            budget = "detail low" if self.low_detail else "keep_tokens"
            raise UserError(
                f"prompts of a {self.host.kind} model do not say which crops are of"
                f" one image: give keep_ratio in place of {budget}"
            )
        views = add_text(self.host, inputs, views, self.pipeline)
        budgets = self._budgets(views)
        return prune_prompt(self.host, inputs, views, self.pipeline, budgets, self.policy)

    def _budgets(self, views: Sequence[View]) -> list[int]:
        """Each view's K."""
        return self._budget.by_view(self.pipeline)(views)

    def _features(self, prompt: PrunedPrompt) -> Any:
        """mlx-vlm's features of the kept rows (1, l, D), at the positions of the whole prompt."""
        arguments = dict(prompt.arguments)
        overrides = {name: arguments.pop(name) for name in OVERRIDES if name in arguments}
        ids_1l, pixels = arguments.pop("input_ids"), arguments.pop("pixel_values", None)
        features = self.host.stock_embeddings(ids_1l, pixels, **arguments)
        bias_l = prompt.bias_l
        overrides[IS_READ] = None if bias_l is None else mx.exp(bias_l.astype(mx.float32))[None]
        return replace(features, **overrides, attention_mask_4d=None)  # a mask that nothing reads

    def _join(
        self, L: int, batch: Sequence[BatchPrompt], kept_columns: Sequence[Sequence[int]],
        features: Sequence[Any],
    ) -> Any:  # fmt: skip
        """mlx-vlm's features of the batch at its full length L, dropped rows marked."""
        Y = len(self.host.deepstack)
        full = [
            to_full_length(L, prompt.columns, rows, kept_features, Y)
            for prompt, rows, kept_features in zip(batch, kept_columns, features, strict=True)
        ]
        joined: dict[str, Any] = dict.fromkeys(PER_ROW)
        for name in full[0]:
            prompt_axis = int(name == "position_ids")
            joined[name] = mx.stack([one[name] for one in full], axis=prompt_axis)
        if features[0].rope_deltas is not None:
            joined["rope_deltas"] = mx.concatenate([one.rope_deltas for one in features])
        return replace(features[0], **joined)


def _all_read(features: Any) -> Any:
    """mlx-vlm's features, none of whose rows is dropped."""
    is_read_BL = mx.array(np.ones(features.inputs_embeds.shape[:2], np.int32))
    return replace(features, **{IS_READ: is_read_BL})
