"""The pieces of a streamed answer, and the whole of it with every figure and a picture."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image

from ..checkpoints.errors import UserError
from ..machine.clock import Timings
from ..pruners.trace import Trace
from .exploration import Exploration
from .overlay import draw_trace
from .tiles import Layout

SHOWN = 200  # characters of an answer's text in its repr


@dataclass(frozen=True, repr=False)
class GenerationResult:
    """A whole answer, and what pruning did.

    `token_ids` are without the token that ended the answer; `generation_tokens` counts it.
    `prompt_tokens` are the rows that the language model read after pruning. Speeds are tokens per
    second, `peak_memory` is in GB (10^9 bytes). `ttft_ms` holds milliseconds up to the first
    token: image (opening and preprocessing), vision (the tower), pruner, prefill (projector,
    splicing and the language model) and total. Of an mlx-vlm model that is not pruned, vision
    and prefill are None: it computes them in one go.

    `visual_tokens_kept` is the average over the language model's layers. `kept_indices` holds, per
    image, the indices in the original grid of the tokens kept to the end, or None where slots are
    pooled from everywhere; `layers` the same for every run of layers. `cache_bytes` is the size
    of the prompt's keys and values. `drafted` and `accepted` count the tokens that a twig
    guessed; None without one. `trace` says what was left of every view of an image, step by
    step; `views` has their pictures, as the tower saw them, each with its (rows, columns) of
    visual tokens; `layouts` how the views of each image lie in it, None where that is not known.
    `rows_reused` of the prompt's rows are those of an earlier one.
    `images` says of each image where what the model saw lies in its file, so that
    a box in the answer can be drawn there: `size` and EXIF `orientation` in the file, `seen`, the
    width and height of what the model saw (of an image in tiles: of the one that shows all of it),
    and `to_original`, the affine map [a, b, c, d, e, f] from the point (x, y) there to the file's
    pixel (a x + b y + c, d x + e y + f), None where processor_kwargs has what is not known.
    `auto` says why this method, where it was chosen; None where it was given.
    `video` says of a clip at how many `seconds` each of its frames is seen, the `grid` of its
    visual tokens (groups of frames, rows, columns), and how many tokens are `kept_by_group`, None
    of pooled slots. Its groups stand below one another in `views`. None without a clip.
    """

    text: str
    token_ids: list[int]
    prompt_tokens: int
    generation_tokens: int
    prompt_tps: float
    generation_tps: float
    peak_memory: float
    finish_reason: str
    visual_tokens: int
    visual_tokens_kept: int
    kept_indices: list[list[int] | None]
    pruner: str
    positions: str
    ttft_ms: Timings
    layers: list[dict[str, Any]] = field(default_factory=list)
    cache_bytes: int = 0
    trace: Trace | None = None
    views: Sequence[tuple[Image.Image, tuple[int, int]]] = ()
    drafted: int | None = None
    accepted: int | None = None
    rows_reused: int = 0
    images: list[dict[str, Any]] = field(default_factory=list)
    layouts: Sequence[Layout | None] = ()
    auto: str | None = None
    video: dict[str, Any] | None = None

    def __repr__(self) -> str:
        """In a line: the answer's beginning and what pruning did."""
        text = self.text if len(self.text) <= SHOWN else f"{self.text[:SHOWN]}…"
        return (
            f"GenerationResult(text={text!r}, generation_tokens={self.generation_tokens},"
            f" visual_tokens={self.visual_tokens}, visual_tokens_kept={self.visual_tokens_kept},"
            f" pruner={self.pruner!r}, finish_reason={self.finish_reason!r})"
        )

    def prefilled(
        self, prompt_tokens: int, ttft_ms: Timings, rows_reused: int = 0
    ) -> "GenerationResult":
        """The same with the figures of a prompt that was read, but for rows of an earlier one."""
        prompt_tps = 1000 * (prompt_tokens - rows_reused) / ttft_ms["total"]
        return replace(self, prompt_tokens=prompt_tokens, prompt_tps=prompt_tps, ttft_ms=ttft_ms,
                       rows_reused=rows_reused)  # fmt: skip

    def overlay(self, caption: str | None = None) -> Image.Image:
        """A picture of what was kept; steps and layers side by side, images below one another,
        each in one panel with its tiles in their places.

        `caption`: the text below, by default the method and its numbers. Raises UserError where
        the prompt had no image.
        """
        if self.trace is None or not self.views:
            raise UserError("there is no overlay: the prompt had no image")
        return draw_trace(
            self.trace, self.views, self.caption() if caption is None else caption, self.layouts
        )

    def explore(self, *others: "GenerationResult") -> Exploration:
        """This answer, and `others` about the same images, on a page that shows what was kept.

        Jupyter shows it; `.save("page.html")` writes it. `mlx-vlm-prune explore` makes a page of
        full and pruned answers that says more. Raises UserError where the prompt had no image, or
        the images differ.
        """
        return Exploration.of(self, *others)

    def caption(self) -> str:
        """The method and its numbers, per image."""
        images = len(self.kept_indices)
        tokens, kept = self.visual_tokens // images, self.visual_tokens_kept / images
        return (
            f"{self.pruner}   {tokens} -> {kept:g} visual tokens ({1 - kept / tokens:.1%} pruned)"
        )


@dataclass(frozen=True)
class GenerationResponse:
    """A piece of an answer, as mlx-lm's: some text, the newest token and the figures so far.

    `text` may be empty, where a character is not complete. `from_draft`: did a twig guess the
    token? Speeds are tokens per second, `peak_memory` is in GB. `finish_reason` is None until the
    last piece, then "stop" (the model ended its answer) or "length" (`max_tokens` were reached).
    `result` is None until the last piece, which has the whole answer and what pruning did.
    """

    text: str
    token: int
    from_draft: bool
    prompt_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    peak_memory: float
    finish_reason: str | None = None
    result: GenerationResult | None = None


class Transcript:
    """Collects the pieces of an answer, whose other figures are known, for its result."""

    def __init__(self, answer: GenerationResult) -> None:
        self.answer = answer
        self.texts: list[str] = []
        self.token_ids: list[int] = []

    def add(self, piece: GenerationResponse, **figures: Any) -> GenerationResponse:
        """The piece; the last one with the result, which also gets these `figures`."""
        self.texts.append(piece.text)
        if piece.finish_reason != "stop":
            self.token_ids.append(piece.token)
        if piece.finish_reason is None:
            return piece
        result = replace(
            self.answer,
            text="".join(self.texts),
            token_ids=self.token_ids,
            generation_tokens=piece.generation_tokens,
            generation_tps=piece.generation_tps,
            peak_memory=piece.peak_memory,
            finish_reason=piece.finish_reason,
            **figures,
        )
        return replace(piece, result=result)
