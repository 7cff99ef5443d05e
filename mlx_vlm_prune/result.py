"""What an answer came to: the text, every figure, and a picture of what was kept."""

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from .checkpoints.errors import UserError
from .model import Prefill, Stop
from .overlay import captioned, overlay, strip


@dataclass(frozen=True)
class Seen:
    """What a picture of the pruning needs: the images as the tower saw them, and what was left
    of them after every step. Without `grids`, one for each, all have the same."""

    images: list[Image.Image]
    grid: tuple[int, int]
    trace: list[Stop]
    grids: list[tuple[int, int]] | None = None


@dataclass(frozen=True)
class GenerationResult:
    """An answer, or in a stream its newest piece, with what it took.

    Times are milliseconds; `ttft_ms` has image (opening and preprocessing), vision (the
    tower), pruner, prefill (projector, splicing and the language model) and total, all up
    to the first token; an mlx-vlm model that is not pruned has "vision and prefill", which
    it computes in one go. Tokens per second; peak memory in GB. `visual_tokens_kept` is the
    average over the language model's layers. `kept_indices` holds, per image, the places
    in the original grid of the tokens kept to the end, or None where slots have none;
    `layers` the same for every run of layers. `cache_bytes` are those of the prompt's rows.
    `drafted` and `accepted` count the tokens that a twig guessed, where one was to.
    """

    text: str
    token: int
    token_ids: list[int]
    prompt_tokens: int
    generation_tokens: int
    prompt_tps: float
    generation_tps: float
    peak_memory: float
    finish_reason: str | None
    visual_tokens: int
    visual_tokens_kept: int
    kept_indices: list[list[int] | None]
    pruner: str
    positions: str
    ttft_ms: dict[str, float]
    layers: list[dict[str, Any]] = field(default_factory=list)
    cache_bytes: int = 0
    seen: Seen | None = None
    drafted: int | None = None
    accepted: int | None = None

    def overlay(self) -> Image.Image:
        """A picture of what was kept; steps and layers side by side, images below one another."""
        if self.seen is None:
            raise UserError("there is no overlay: the prompt had no image")
        stops, rows = self.seen.trace, []
        grids = self.seen.grids or [self.seen.grid] * len(self.seen.images)
        for i, image in enumerate(self.seen.images):
            pictures = []
            for stop in stops:
                index, weight = stop.kept[i].index_BK, stop.kept[i].weight_BKN
                kept = [] if index is None else list(np.array(index[0]))
                weights = None if weight is None else np.array(weight[0].astype(mx.float32))
                step = f"{stop.step}: {len(kept)} left" if len(stops) > 1 else self.caption()
                pictures.append(overlay(image, grids[i], kept, step, weights=weights))
            rows.append(strip(pictures) if len(pictures) > 1 else pictures[0])
        if len(stops) > 1:
            return captioned(strip(rows, down=True), self.caption())
        return strip(rows) if len(rows) > 1 else rows[0]

    def caption(self) -> str:
        """The method and its numbers, per image."""
        images = len(self.kept_indices)
        tokens, kept = self.visual_tokens // images, self.visual_tokens_kept / images
        return (
            f"{self.pruner}   {tokens} -> {kept:g} visual tokens ({1 - kept / tokens:.1%} pruned)"
        )


def worth_a_picture(before: Prefill) -> list[Stop]:
    """The stops worth a picture: those at which tokens left, or the only one."""
    named = [stop for stop in before.trace if stop.step]
    return named or before.trace


def by_layers(before: Prefill, layers: int) -> list[dict[str, Any]]:
    """Which tokens of each image every run of layers holds."""
    last = {stop.layer: stop.kept for stop in before.trace}
    ends = [*list(last)[1:], layers] if last else []
    return [
        {
            "first": first,
            "last": end - 1,
            "visual_tokens": sum(one.slots for one in kept),
            "kept_indices": [
                k.index_BK if k.index_BK is None else k.index_BK[0].tolist() for k in kept
            ],
        }
        for (first, kept), end in zip(last.items(), ends, strict=True)
    ]
