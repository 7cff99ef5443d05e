"""The token loop: from a prompt and images to an answer, a token at a time, timed in parts.

Shapes: B prompts (1 here), I images, L tokens, V words.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from .checkpoints.errors import UserError
from .image import open_image
from .loading import Processor
from .model import VLM, Prefill
from .prompt import Prompt, build
from .pruners import Pipeline, Pruner, Reduction, plan
from .pruners.budget import budget
from .pruners.contract import Policy
from .request import ImageSource, Request
from .result import GenerationResult, Seen, by_layers, worth_a_picture
from .speculate import Speculation, Token, check_drafts, growth_of
from .towers.between import Encoded

WITHIN = {"projector": "prefill"}  # laps that a user reads as part of another


class Clock:
    """Times the parts of a request; a lap ends when its arrays are computed."""

    def __init__(self, parts: Sequence[str] = ("image", "vision", "pruner", "prefill")) -> None:
        self.began = self.last = time.perf_counter()
        self.ms: dict[str, float] = dict.fromkeys(parts, 0.0)

    def lap(self, name: str, value: Any = None) -> Any:
        """Evaluate the value, book the time since the last lap, and hand the value on."""
        if isinstance(value, Reduction):
            mx.eval(value.parts)
        elif value is not None:
            mx.eval(value.signals.x_BND if isinstance(value, Encoded) else value)
        now = time.perf_counter()
        self.ms[WITHIN.get(name, name)] += 1000 * (now - self.last)
        self.last = now
        return value

    def ttft(self) -> dict[str, float]:
        return {**self.ms, "total": 1000 * (self.last - self.began)}


def stream_generate(
    model: Any,
    processor: Any,
    prompt: str,
    image: ImageSource | Sequence[ImageSource] | None = None,
    *,
    pruner: str | Pruner | Pipeline = "none",
    keep_ratio: float | None = None,
    keep_tokens: int | None = None,
    positions: Policy | None = None,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    template: Mapping[str, Any] | None = None,
    prefill_step_size: int | None = None,
    kv_bits: float | None = None,
    quantized_kv_start: int | None = None,
    resize_shape: Sequence[int] | None = None,
    num_draft_tokens: int | None = None,
) -> Iterator[GenerationResult]:
    """Answer a prompt about any number of images, one piece of text at a time.

    `model` and `processor` are `load`'s, ours or mlx-vlm's. `<image>` in the prompt marks
    where an image goes; without it the images come first. `pruner` is "NAME",
    "NAME:option=value" or a chain "NAME+NAME"; of each image's N visual tokens K stay (of a
    decoder method in the average layer), by `keep_ratio` or `keep_tokens`. Without `positions`,
    those of the method's paper. `temperature` 0 is greedy. `template` are options of the chat
    template, such as {"open_thinking": True}. The next four are for mlx-vlm's models: rows
    read at once, bits of a cached number from which row on, sides that pictures are to fit in.
    `num_draft_tokens`, for a model of ours with a twig: how many tokens that may guess ahead;
    the greedy answer stays the same. Raises UserError.
    """
    asked = Request(
        prompt, _listed(image), pruner, keep_ratio, keep_tokens, positions, max_tokens,
        temperature, top_p, seed, template, prefill_step_size, kv_bits, quantized_kv_start,
        resize_shape, num_draft_tokens,
    )  # fmt: skip
    check_drafts(num_draft_tokens, temperature, isinstance(model, VLM))
    yield from (_own if isinstance(model, VLM) else _hosts())(model, processor, asked)


def _hosts() -> Any:
    from .hosts.stream import stream_generate as elsewhere

    return elsewhere


def _own(model: VLM, processor: Processor, request: Request) -> Iterator[GenerationResult]:
    """The answer of a model of ours."""
    if request.is_for_mlx_vlm:
        raise UserError(
            "--prefill-step-size, --kv-bits, --quantized-kv-start and --resize-shape are for"
            " mlx-vlm models"
        )
    clock, chosen = Clock(), resolve(model, request.pruner)
    K = budget(model.N, request.keep_ratio, request.keep_tokens, chosen)
    growth = growth_of(model, processor.name) if request.num_draft_tokens else None
    asked = ask(model, processor, request.prompt, request.images, request.template)
    clock.lap("image", asked.pixels)
    mx.reset_peak_memory()
    before = model(
        [asked.prompt], asked.pixels, chosen, K, request.positions, lap=clock.lap, growth=growth
    )
    picker = Picker(request.temperature, request.top_p, request.seed)
    positions = request.positions or chosen.positions
    said = _begin(before, chosen, positions, model, len(asked.visible))
    if asked.visible:
        said = replace(said, seen=Seen(asked.visible, model.grid, worth_a_picture(before)))
    first_B1 = clock.lap("prefill", picker(before.logits_BLV[:, -1]))
    if growth and request.num_draft_tokens:
        held = said.cache_bytes + sum(layer.nbytes for layer in growth.cache)
        said, ends = replace(said, cache_bytes=held), processor.tokenizer.eos_token_ids
        turns = Speculation(model, before, growth, ends, request.num_draft_tokens)
        tokens = turns.tokens(int(np.array(first_B1)[0, 0]), request.max_tokens)
    else:
        tokens = _one_by_one(model, before, picker, first_B1, request.max_tokens)
    yield from _written(tokens, processor, said, clock, request.max_tokens)


@dataclass(frozen=True)
class Asked:
    """A prompt and its images, ready for the model."""

    prompt: Prompt
    visible: list[Image.Image]  # what the tower sees of each image
    pixels: mx.array | None

    @property
    def text(self) -> int:
        """Tokens of text."""
        return len(self.prompt.ids) - sum(length for _, length in self.prompt.runs)


def ask(
    model: VLM,
    processor: Processor,
    prompt: str,
    image: ImageSource | Sequence[ImageSource] | None = None,
    template: Mapping[str, Any] | None = None,
) -> Asked:
    """Open the images and turn all into ids and pixels. Raises UserError."""
    visible = [processor.image.visible(open_image(source)) for source in _listed(image)]
    counts = [model.N] * len(visible)
    built = build(processor.tokenizer, prompt, counts, processor.image_token, options=template)
    text = model.config.text
    if fault := built.too_much(text.max_position_embeddings, text.vocab_size):
        raise UserError(f"the prompt {fault}")
    pixels = None
    if visible:
        values = np.stack([processor.image.values(picture) for picture in visible])
        pixels = mx.array(values).astype(model.dtype)
    return Asked(built, visible, pixels)


def generate(
    model: Any,
    processor: Any,
    prompt: str,
    image: ImageSource | Sequence[ImageSource] | None = None,
    *,
    verbose: bool = False,
    **options: Any,
) -> GenerationResult:
    """The whole answer at once; the options are those of `stream_generate`."""
    pieces = []
    for piece in stream_generate(model, processor, prompt, image, **options):
        if verbose:
            print(piece.text, end="", flush=True)
        pieces.append(piece.text)
    if verbose:
        print()
    return replace(piece, text="".join(pieces))


class Picker:
    """Chooses the next token: greedy, or from the smallest set that holds `top_p` of the odds."""

    def __init__(self, temperature: float, top_p: float, seed: int):
        self.temperature, self.top_p, self.key = temperature, top_p, mx.random.key(seed)

    def __call__(self, logits_BV: mx.array) -> mx.array:
        """Token ids (B, 1)."""
        if self.temperature == 0:
            return mx.argmax(logits_BV, axis=-1, keepdims=True)
        logits_BV = logits_BV.astype(mx.float32) / self.temperature
        if self.top_p < 1:
            order_BV = mx.argsort(-logits_BV, axis=-1)
            ranked_BV = mx.take_along_axis(mx.softmax(logits_BV, axis=-1), order_BV, axis=-1)
            before_BV = mx.cumsum(ranked_BV, axis=-1) - ranked_BV
            rank_BV = mx.argsort(order_BV, axis=-1)
            outside_BV = mx.take_along_axis(before_BV, rank_BV, axis=-1) >= self.top_p
            logits_BV = mx.where(outside_BV, -mx.inf, logits_BV)
        self.key, now = mx.random.split(self.key)
        return mx.random.categorical(logits_BV, key=now)[:, None]


def _one_by_one(
    model: VLM, before: Prefill, picker: Picker, token_B1: mx.array, max_tokens: int
) -> Iterator[Token]:
    """The first token and the next ones; while one is being printed, the next is being made."""
    position_B1 = before.next_B1
    for _ in range(max_tokens - 1):
        coming_B1 = picker(model.step(token_B1, position_B1, before)[:, -1])
        mx.async_eval(coming_B1)
        yield Token(int(np.array(token_B1)[0, 0]))
        token_B1, position_B1 = coming_B1, position_B1 + 1
    yield Token(int(np.array(token_B1)[0, 0]))


def _written(
    tokens: Iterator[Token],
    processor: Processor,
    said: GenerationResult,
    clock: Clock,
    max_tokens: int,
) -> Iterator[GenerationResult]:
    """Tokens as text, with the figures up to each, until the answer ends."""
    ttft, writer = clock.ttft(), processor.tokenizer.detokenizer()
    said = replace(said, ttft_ms=ttft, prompt_tps=1000 * said.prompt_tokens / ttft["total"])
    ids: list[int] = []
    began = time.perf_counter()
    for n, (token, drafted, accepted) in enumerate(tokens, 1):
        ended = token in processor.tokenizer.eos_token_ids
        reason = "stop" if ended else "length" if n == max_tokens else None
        ids += [] if ended else [token]
        text = "" if ended else writer.add(token)
        seconds = time.perf_counter() - began
        yield replace(
            said,
            text=text + (writer.finish() if reason else ""),
            token=token,
            token_ids=list(ids),
            generation_tokens=n,
            generation_tps=(n - 1) / seconds if n > 1 and seconds else 0.0,
            peak_memory=mx.get_peak_memory() / 1e9,
            finish_reason=reason,
            drafted=drafted,
            accepted=accepted,
        )
        if reason:
            return


def _begin(
    before: Prefill, pruner: Pipeline, positions: str, model: VLM, images: int
) -> GenerationResult:
    layers = by_layers(before, model.config.text.num_hidden_layers)
    if any(kept is None for run in layers for kept in run["kept_indices"]):
        positions = "renumber"  # pooled slots have no place of their own
    rows = sum(run["visual_tokens"] * (run["last"] - run["first"] + 1) for run in layers)
    return GenerationResult(
        text="", token=-1, token_ids=[], prompt_tokens=before.lengths[0], generation_tokens=0,
        prompt_tps=0.0, generation_tps=0.0, peak_memory=0.0, finish_reason=None,
        visual_tokens=model.N * images,
        visual_tokens_kept=round(rows / model.config.text.num_hidden_layers),
        kept_indices=layers[-1]["kept_indices"] if layers else [],
        pruner=pruner.name, positions=positions, ttft_ms={}, layers=layers,
        cache_bytes=sum(layer.nbytes for layer in before.cache),
    )  # fmt: skip


def resolve(model: VLM, pruner: str | Pruner | Pipeline) -> Pipeline:
    """The methods that are named, if the model can do them. Raises UserError."""
    chosen = plan(pruner, model.learned)
    chosen.want(model.config.vision.depth)  # a layer that is not there is said early
    return chosen


def _listed(image: ImageSource | Sequence[ImageSource] | None) -> list[ImageSource]:
    if image is None:
        return []
    if isinstance(image, ImageSource):
        return [image]
    return list(image)
