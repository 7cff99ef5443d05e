"""From a prompt and images to an answer, a token at a time, timed in parts.

Shapes: B prompts (1 here), I images, L tokens, V words.
"""

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from ..checkpoints.errors import UserError
from ..image import open_image
from ..laps import Clock
from ..loading import Processor
from ..model import VLM
from ..prompt import Detokenizer, Prompt, build
from ..pruners import Pipeline, Pruner, plan
from ..pruners.budget import budget
from ..pruners.contract import Policy
from ..pruners.trace import Trace
from .request import ImageSource, Request
from .result import GenerationResult
from .speculation import Speculation, Token, check_drafts, twig_of
from .steps import generate_step, make_sampler


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
    request = Request(
        prompt, _listed(image), pruner, keep_ratio, keep_tokens, positions, max_tokens,
        temperature, top_p, seed, template, prefill_step_size, kv_bits, quantized_kv_start,
        resize_shape, num_draft_tokens,
    )  # fmt: skip
    check_drafts(num_draft_tokens, temperature, isinstance(model, VLM))
    yield from (_own if isinstance(model, VLM) else _hosts())(model, processor, request)


def _hosts() -> Any:
    from ..hosts.stream import stream_generate as elsewhere

    return elsewhere


def _own(model: VLM, processor: Processor, request: Request) -> Iterator[GenerationResult]:
    """The answer of a model of ours."""
    if request.is_for_mlx_vlm:
        raise UserError(
            "--prefill-step-size, --kv-bits, --quantized-kv-start and --resize-shape are for"
            " mlx-vlm models"
        )
    clock, pipeline = Clock(), resolve(model, request.pruner)
    K = budget(model.N, request.keep_ratio, request.keep_tokens, pipeline)
    twig = twig_of(model, processor.name) if request.num_draft_tokens else None
    prompt = prepare(model, processor, request.prompt, request.images, request.template)
    clock.lap("image", prompt.pixels)
    mx.reset_peak_memory()
    with clock.running():
        prefill = model([prompt.prompt], prompt.pixels, pipeline, K, request.positions, twig=twig)
    sampler = make_sampler(request.temperature, request.top_p, request.seed)
    first_B1 = clock.lap("prefill", sampler(prefill.logits_BV))
    cache_bytes = prefill.cache_bytes
    if twig and request.num_draft_tokens:
        cache_bytes += sum(layer.nbytes for layer in twig.cache)
        ends = processor.tokenizer.eos_token_ids
        turns = Speculation(prefill, twig, ends, request.num_draft_tokens)
        tokens = turns.tokens(int(np.array(first_B1)[0, 0]), request.max_tokens)
    else:
        steps = generate_step(prefill, first_B1, sampler, request.max_tokens)
        tokens = (Token(int(np.array(token_B1)[0, 0])) for token_B1 in steps)
    depth = model.config.text.num_hidden_layers
    answer = replace(
        empty_answer(prefill.trace, depth, pipeline, request.positions or pipeline.positions),
        prompt_tokens=prefill.rows[0],
        cache_bytes=cache_bytes,
        views=[(picture, model.grid) for picture in prompt.visible],
    )
    yield from _written(tokens, processor, answer, clock.ttft(), request.max_tokens)


@dataclass(frozen=True)
class PreparedPrompt:
    """A prompt and its images, ready for the model."""

    prompt: Prompt
    visible: list[Image.Image]  # what the tower sees of each image
    pixels: mx.array | None

    @property
    def text(self) -> int:
        """Tokens of text."""
        return len(self.prompt.ids) - sum(length for _, length in self.prompt.runs)


def prepare(
    model: VLM,
    processor: Processor,
    prompt: str,
    image: ImageSource | Sequence[ImageSource] | None = None,
    template: Mapping[str, Any] | None = None,
) -> PreparedPrompt:
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
    return PreparedPrompt(built, visible, pixels)


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


def empty_answer(trace: Trace, depth: int, pipeline: Pipeline, positions: str) -> GenerationResult:
    """The figures of an answer that are known before its first token; `depth` counts the language
    model's layers."""
    layers = trace.layers(depth)
    if any(kept is None for run in layers for kept in run["kept_indices"]):
        positions = "renumber"  # pooled slots have no place of their own
    rows = sum(run["visual_tokens"] * (run["last"] - run["first"] + 1) for run in layers)
    return GenerationResult(
        text="", token=-1, token_ids=[], prompt_tokens=0, generation_tokens=0, prompt_tps=0.0,
        generation_tps=0.0, peak_memory=0.0, finish_reason=None, visual_tokens=sum(trace.sizes),
        visual_tokens_kept=round(rows / depth),
        kept_indices=layers[-1]["kept_indices"] if layers else [],
        pruner=pipeline.name, positions=positions, ttft_ms={}, layers=layers, trace=trace,
    )  # fmt: skip


def _written(
    tokens: Iterator[Token],
    processor: Processor,
    answer: GenerationResult,
    ttft_ms: dict[str, float],
    max_tokens: int,
) -> Iterator[GenerationResult]:
    """Tokens as text, with the figures up to each, until the answer ends."""
    writer, ids = Detokenizer(processor.tokenizer), list[int]()
    prompt_tps = 1000 * answer.prompt_tokens / ttft_ms["total"]
    answer = replace(answer, ttft_ms=ttft_ms, prompt_tps=prompt_tps)
    start = time.perf_counter()
    for n, (token, drafted, accepted) in enumerate(tokens, 1):
        ended = token in processor.tokenizer.eos_token_ids
        reason = "stop" if ended else "length" if n == max_tokens else None
        ids += [] if ended else [token]
        text = "" if ended else writer.add(token)
        seconds = time.perf_counter() - start
        yield replace(
            answer,
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


def resolve(model: VLM, pruner: str | Pruner | Pipeline) -> Pipeline:
    """The methods that are named, if the model can do them. Raises UserError."""
    chosen = plan(pruner, model.learned)
    chosen.want(model.config.vision.depth)  # a layer that is not there is said early
    return chosen


def _listed(image: ImageSource | Sequence[ImageSource] | None) -> list[ImageSource]:
    if image is None:
        return []
    images: Any = image
    if isinstance(images, ImageSource) or not isinstance(images, Iterable):
        images = [images]
    images = list(images)  # of an iterator, which can be read once
    for one in images:
        if not isinstance(one, ImageSource | os.PathLike):
            raise UserError(f"an image is {one!r}; give a path, a file's bytes or a Pillow image")
    return images
