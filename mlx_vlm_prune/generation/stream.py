"""Our models' answer to a request: prepare, prefill, sample, a token at a time, timed in parts.

Shapes: B prompts (1 here), I images, L tokens, V words.
"""

import functools
import logging
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
from PIL import Image

from ..checkpoints.errors import UserError
from ..inputs.budget import budget
from ..inputs.detokenizer import Detokenizer
from ..inputs.ends import end_token_ids
from ..inputs.image import MAX_PIXELS, open_image
from ..inputs.image_sources import ImageSource
from ..inputs.messages import tokenize_conversation
from ..inputs.processor import Processor
from ..inputs.prompt import Prompt
from ..machine.clock import Clock, request_clock
from ..models.decoder import TwigReader
from ..models.vlm import VLM, Prefill
from ..pruners import Pipeline, Pruner, plan
from ..pruners.contract import Policy
from ..pruners.trace import Trace
from .request import HOST_OPTIONS, Request, list_images
from .result import GenerationResponse, GenerationResult, Transcript
from .sampling import check_sampling
from .speculation import Speculation, Token, twig_of
from .steps import (
    check_first_logits,
    first_not_finite,
    generate_step,
    make_chooser,
    naming_faulty_part,
)

logger = logging.getLogger("mlx_vlm_prune")


def stream_generate(
    model: VLM, processor: Processor, request: Request
) -> Iterator[GenerationResponse]:
    """Stream the answer of a model of ours. Raises UserError."""
    check_request(processor, request)
    clock, pipeline = request_clock(), pipeline_for(model, request.pruner)
    K = budget(model.N, request.keep_ratio, request.keep_tokens, pipeline)
    twig = twig_of(model, processor.name) if request.num_draft_tokens else None
    prompt = prepare_request(model, processor, request)
    clock.end_part("image", prompt.pixels)
    mx.reset_peak_memory()
    with naming_faulty_part(partial(faulty_part, model, [prompt.prompt], prompt.pixels)):
        with clock.running():
            prefill = model(
                [prompt.prompt], prompt.pixels, pipeline, K, request.positions, twig=twig
            )
        read = PromptRead(
            prompt.prompt.ids, prompt.visible, pipeline, prefill, images=prompt.images
        )
        yield from stream_answer(model, processor, request, read, clock, twig)


@dataclass(frozen=True)
class PromptRead:
    """A prompt that a model of ours has read."""

    ids: Sequence[int]
    visible: Sequence[Image.Image]  # what the tower sees of each image
    pipeline: Pipeline
    prefill: Prefill
    rows_reused: int = 0  # of an earlier prompt
    images: Sequence[dict[str, Any]] = ()  # where what is visible lies in the files


def stream_answer(
    model: VLM, processor: Processor, request: Request, read: PromptRead, clock: Clock,
    twig: TwigReader | None = None,
) -> Iterator[GenerationResponse]:  # fmt: skip
    """The answer to a prompt that was read; `clock` has timed it up to here."""
    prefill = read.prefill
    choose_token, ends = make_chooser(request, [read.ids]), answer_ends(processor, request)
    first_B1 = clock.end_part("prefill", choose_token(prefill.logits_BV))
    check_first_logits(prefill.logits_BV)
    cache_bytes = prefill.cache_bytes
    if twig and request.num_draft_tokens:
        cache_bytes += sum(layer.nbytes for layer in twig.cache)
        turns = Speculation(prefill, twig, ends, request.num_draft_tokens)
        tokens = turns.tokens(int(np.array(first_B1)[0, 0]), request.max_tokens)
    else:
        steps = generate_step(prefill, first_B1, choose_token, request.max_tokens)
        tokens = (Token(int(np.array(token_B1)[0, 0])) for token_B1 in steps)
    answer = replace(prefilled_result(model, request, read, clock), cache_bytes=cache_bytes)
    writer = AnswerWriter(Detokenizer(processor.tokenizer), ends, answer, request.max_tokens)
    for token in tokens:
        yield (piece := writer.add(*token))
        if piece.finish_reason:
            return


def prefilled_result(
    model: VLM, request: Request, read: PromptRead, clock: Clock
) -> GenerationResult:
    """The result before decoding: what pruning did to a prompt, and the times up to here."""
    prefill, policy = read.prefill, request.positions or read.pipeline.positions
    depth = model.config.text.num_hidden_layers
    result = replace(
        initial_result(prefill.trace, depth, read.pipeline, policy),
        cache_bytes=prefill.cache_bytes,
        views=[(picture, model.grid) for picture in read.visible],
        images=[*read.images],
    )
    return result.prefilled(prefill.rows[0], clock.ttft(), read.rows_reused)


NO_CLIPS = "give some of its frames as images"


def check_request(processor: Processor, request: Request) -> None:
    """Raises UserError for options that no model of ours, or not this one, can have."""
    refuse_host_options(request)
    if request.video is not None:
        raise UserError(f"this model reads no video; {NO_CLIPS}")
    check_sampling(request)
    answer_ends(processor, request)


def answer_ends(processor: Processor, request: Request) -> frozenset[int]:
    """The ids that end an answer: the checkpoint's and the caller's. Raises UserError."""
    tokenizer = processor.tokenizer
    return tokenizer.eos_token_ids | end_token_ids(
        request.eos_tokens, tokenizer.backend.token_to_id, tokenizer.encode, tokenizer.name
    )


def faulty_part(model: VLM, prompts: Sequence[Prompt], pixels_IHW3: mx.array | None) -> str:
    """Which part of a model gives what is not finite; all before the layers is computed again."""
    read = model.splice_images(prompts, pixels_IHW3, plan("none"), model.N)
    parts = [("the vision tower", batch.encoded.x_BND) for batch in read.batches]
    parts += [("the projector", batch.signals.x_BND) for batch in read.batches]
    return first_not_finite([*parts, ("the table of word embeddings", read.spliced.x_BLD)])


def refuse_host_options(request: Request) -> None:
    """Raises UserError where there is an option that only mlx-vlm's models have."""
    if request.given_host_options:
        *names, last = HOST_OPTIONS
        raise UserError(f"{', '.join(names)} and {last} are for mlx-vlm models")


@dataclass(frozen=True)
class PreparedPrompt:
    """A prompt and its images, ready for the model."""

    prompt: Prompt
    visible: list[Image.Image]  # what the tower sees of each image
    pixels: mx.array | None
    images: Sequence[dict[str, Any]] = ()  # where that lies in each image's file

    @property
    def text_tokens(self) -> int:
        """How many tokens of the prompt are text."""
        return len(self.prompt.ids) - sum(length for _, length in self.prompt.runs)

    def shown_in(self, result: GenerationResult, grid: tuple[int, int]) -> GenerationResult:
        """The result with the images, of whose visual tokens `grid` are rows and columns."""
        views = [(picture, grid) for picture in self.visible]
        return replace(result, views=views, images=[*self.images])


def prepare_request(model: VLM, processor: Processor, request: Request) -> PreparedPrompt:
    """The prompt and the images of a request. Raises UserError."""
    return prepare_prompt(
        model, processor, request.prompt, request.images, request.chat_template_config,
        request.system, request.pixel_limit,
    )  # fmt: skip


def prepare_prompt(
    model: VLM,
    processor: Processor,
    prompt: str,
    image: ImageSource | Sequence[ImageSource] | None = None,
    chat_template_config: Mapping[str, Any] | None = None,
    system: str | None = None,
    max_pixels: int = MAX_PIXELS,
) -> PreparedPrompt:
    """Open the images and turn all into ids and pixels. Raises UserError."""
    opened = [open_image(source, max_pixels) for source in list_images(image)]
    visible = [processor.image.visible(picture) for picture in opened]
    counts = [model.N] * len(visible)
    built = tokenize_conversation(
        processor.tokenizer, (), prompt, counts, processor.image_token, chat_template_config, system
    )
    check_prompt(model, built)
    pixels = None
    if visible:
        values = np.stack([processor.image.values(picture) for picture in visible])
        pixels = mx.array(values).astype(model.dtype)
    return PreparedPrompt(built, visible, pixels, [*map(processor.image.placement, opened)])


def check_prompt(model: VLM, prompt: Prompt) -> None:
    """Raises UserError for a prompt that exceeds a limit of the model."""
    text = model.config.text
    if fault := prompt.limit_error(text.max_position_embeddings, text.vocab_size):
        raise UserError(f"the prompt {fault}")


def initial_result(
    trace: Trace, depth: int, pipeline: Pipeline, positions: Policy
) -> GenerationResult:
    """The result before decoding: what pruning did. `depth` counts the language model's layers."""
    layers = trace.layers(depth)
    rows = sum(run["visual_tokens"] * (run["last"] - run["first"] + 1) for run in layers)
    return GenerationResult(
        text="", token_ids=[], prompt_tokens=0, generation_tokens=0, prompt_tps=0.0,
        generation_tps=0.0, peak_memory=0.0, finish_reason="", visual_tokens=sum(trace.sizes),
        visual_tokens_kept=round(rows / depth),
        kept_indices=layers[-1]["kept_indices"] if layers else [],
        pruner=pipeline.spec, positions=trace.policy(positions), ttft_ms=Clock().ttft(),
        layers=layers,
        trace=trace,
    )  # fmt: skip


class TextWriter(Protocol):
    """Turns token ids into text as they come."""

    def add(self, token: int) -> str:
        """The text that is now safe to print."""
        ...

    def finish(self) -> str:
        """What was held back."""
        ...


class AnswerWriter:
    """Tokens as text, with the figures up to each; the last piece has the whole answer.

    `answer` has the figures of the prompt. An answer ends at an id in `ends`, or with its
    token number `max_tokens`.
    """

    def __init__(
        self, text: TextWriter, ends: Collection[int], answer: GenerationResult, max_tokens: int
    ) -> None:
        self.text, self.ends, self.max_tokens = text, ends, max_tokens
        self.answer, self.transcript = answer, Transcript(answer)
        self.tokens, self.start = 0, time.perf_counter()

    def add(
        self, token: int, drafted: int | None = None, accepted: int | None = None,
        from_draft: bool = False,
    ) -> GenerationResponse:  # fmt: skip
        """The piece of a token."""
        self.tokens += 1
        n, answer, ended = self.tokens, self.answer, token in self.ends
        reason = "stop" if ended else "length" if n == self.max_tokens else None
        text = "" if ended else self.text.add(token)
        seconds = time.perf_counter() - self.start
        piece = GenerationResponse(
            text=text + (self.text.finish() if reason else ""),
            token=token,
            from_draft=from_draft,
            prompt_tokens=answer.prompt_tokens,
            prompt_tps=answer.prompt_tps,
            generation_tokens=n,
            generation_tps=(n - 1) / seconds if n > 1 and seconds else 0.0,
            peak_memory=mx.get_peak_memory() / 1e9,
            finish_reason=reason,
        )
        return self.transcript.add(piece, drafted=drafted, accepted=accepted)


def default_pruner(model: Any) -> str:
    """The method that a model of ours was trained with, inside; none for others."""
    return model.config.pruner[0] if isinstance(model, VLM) and model.config.pruner else "none"


@functools.cache
def _say_default(name: str, tokens: int) -> None:
    """Once for each method."""
    logger.warning(
        "this checkpoint was trained with %s, which keeps %d visual tokens of an image, and that is"
        " the default; pruner='none' keeps all", name, tokens,
    )  # fmt: skip


def pipeline_for(model: VLM, pruner: str | Pruner | Pipeline | None) -> Pipeline:
    """The methods that a specification names; None is what the checkpoint was trained with.

    Raises UserError where the model cannot do them.
    """
    if pruner is None and model.config.pruner:
        _say_default(*model.config.pruner)
    pipeline = plan(default_pruner(model) if pruner is None else pruner, model.learned)
    pipeline.signal_layers(model.config.vision.depth)  # refuses a layer that the tower has not
    return pipeline
