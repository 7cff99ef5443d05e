"""What an answer came to: the text, every figure, and a picture of what was kept."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from ..checkpoints.errors import UserError
from ..pruners.trace import Trace
from .overlay import draw_trace


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
    `drafted` and `accepted` count the tokens that a twig guessed, where one was to. `trace` says
    what was left of every view of an image, step by step; `views` has their pictures, as the
    tower saw them, each with its rows and columns of visual tokens.
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
    trace: Trace | None = None
    views: Sequence[tuple[Image.Image, tuple[int, int]]] = ()
    drafted: int | None = None
    accepted: int | None = None

    def overlay(self) -> Image.Image:
        """A picture of what was kept; steps and layers side by side, images below one another."""
        if self.trace is None or not self.views:
            raise UserError("there is no overlay: the prompt had no image")
        return draw_trace(self.trace, self.views, self.caption())

    def caption(self) -> str:
        """The method and its numbers, per image."""
        images = len(self.kept_indices)
        tokens, kept = self.visual_tokens // images, self.visual_tokens_kept / images
        return (
            f"{self.pruner}   {tokens} -> {kept:g} visual tokens ({1 - kept / tokens:.1%} pruned)"
        )
