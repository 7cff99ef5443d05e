"""Answers of our models to a batch of questions, and log-probabilities of the right answers.

One prefill serves both: a fork of its cache reads the right answers, and the model's answers are
generated from the prefill itself.

Shapes: B questions, I their images, U different images among them, A tokens of the
longest right answer with its end, V words, H height, W width.
"""

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from ..checkpoints.errors import UserError
from ..generation.prefill import Prefill
from ..generation.steps import PADDING, greedy_answers, likelihood
from ..inputs.image import MAX_PIXELS, open_image
from ..inputs.processor import Processor
from ..inputs.prompt import Prompt, tokenize_prompt
from ..models.towers.signals import Encoded
from ..models.vlm import VLM
from ..pruners import Pipeline
from .questions import ClipFile, Question


@dataclass(frozen=True)
class PreparedQuestion:
    """A question as the model reads it: ids, pixels, and the right answer's ids with its end."""

    prompt: Prompt
    pixels_IHW3: np.ndarray
    right_ids: list[int]


def open_question_images(question: Question, max_pixels: int) -> list[Image.Image]:
    """The images of a question. Raises UserError if one cannot be opened, and for a clip."""
    if isinstance(question.image, ClipFile):
        raise UserError("it is about a video, and this model reads none")
    first = question.image() if callable(question.image) else question.image
    return [open_image(image, max_pixels) for image in (first, *question.more_images)]


def prepare_question(
    model: VLM, processor: Processor, question: Question, max_pixels: int = MAX_PIXELS
) -> PreparedQuestion:
    """Open the images and build the prompt. Raises UserError where it cannot be asked."""
    images, tokenizer = open_question_images(question, max_pixels), processor.tokenizer
    sizes = [model.N] * len(images)
    prompt = tokenize_prompt(tokenizer, question.text, sizes, processor.image_token)
    text = model.config.text
    if fault := prompt.limit_error(text.max_position_embeddings, text.vocab_size):
        raise UserError(f"it {fault}")
    right = question.answers[0] if question.answers else ""  # then nothing is made of it
    right_ids = [*tokenizer.encode(right), *sorted(tokenizer.eos_token_ids)[:1]]
    return PreparedQuestion(prompt, np.stack([*map(processor.image, images)]), right_ids)


class QuestionBatch:
    """Prepared questions as arrays, made once for all methods.

    `distinct_I` is the number of each image's picture among the U different ones, `first_U` the
    first image of each different picture. `right_BA` is padded with -1.
    """

    def __init__(self, model: VLM, prepared: Sequence[PreparedQuestion]):
        self.prompts = [question.prompt for question in prepared]
        images = [pixels_HW3 for question in prepared for pixels_HW3 in question.pixels_IHW3]
        pictures = [pixels_HW3.tobytes() for pixels_HW3 in images]
        distinct = list(dict.fromkeys(pictures))
        self.distinct_I = mx.array([distinct.index(picture) for picture in pictures])
        self.first_U = mx.array([pictures.index(picture) for picture in distinct])
        self.pixels_IHW3 = mx.array(np.stack(images)).astype(model.dtype)
        right_B = [question.right_ids for question in prepared]
        A = max(map(len, right_B))
        self.right_BA = np.array([ids + [PADDING] * (A - len(ids)) for ids in right_B])
        self.sizes = [model.N] * len(images)  # visual tokens of each image


class SharedTower:
    """A tower that encodes each different picture of a batch once, for all methods behind it.

    Methods inside the tower (`cuts`) and on the image have a pass of their own.
    """

    def __init__(self, tower: Any, want: Mapping[str, int | None]):
        self.tower, self.want = tower, dict(want)
        self.batch: QuestionBatch | None = None
        self.encoded: Encoded | None = None

    def start(self, batch: QuestionBatch) -> None:
        """Set the batch whose pictures are encoded from here on."""
        self.batch, self.encoded = batch, None

    def __call__(self, pixels_IHW3: mx.array, want: dict, cuts: Sequence) -> Encoded:
        assert self.batch
        is_full_size = pixels_IHW3 is self.batch.pixels_IHW3
        if cuts or not is_full_size or not want.items() <= self.want.items():
            return self._encode(pixels_IHW3, want, cuts)
        if self.encoded is None:
            self.encoded = self._encode(pixels_IHW3, self.want, ())
        return self.encoded

    def _encode(self, pixels_IHW3: mx.array, want: dict, cuts: Sequence) -> Encoded:
        assert self.batch
        distinct_I = self.batch.distinct_I
        encoded = self.tower(pixels_IHW3[self.batch.first_U], want, cuts)
        signals = {name: array[distinct_I] for name, array in encoded.signals.arrays.items()}
        kept = encoded.kept and encoded.kept.of_images(distinct_I)
        return Encoded(encoded.signals.replace(**signals), kept)


def share_tower(model: VLM, pipelines: Sequence[Pipeline]) -> tuple[VLM, SharedTower]:
    """A copy of the model whose tower runs once for all these methods."""
    want: dict[str, int | None] = {}
    for pipeline in pipelines:
        want |= pipeline.signal_layers(model.config.vision.depth, model.config.vision.layers_behind)
    shared = copy.copy(model)
    tower = SharedTower(model.tower, want)
    shared.tower = tower  # type: ignore[assignment]  # called like a tower
    return shared, tower


@dataclass(frozen=True)
class DraftFigures:
    """How many tokens a twig drafted and how many of those were right; how many tokens came after
    the first ones of the answers, and in how many seconds."""

    drafted: int = 0
    accepted: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def __add__(self, other: "DraftFigures") -> "DraftFigures":
        return DraftFigures(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def columns(self) -> dict[str, float | None]:
        """As they stand in a row of the result; None where nothing was drafted or timed."""
        share = round(self.accepted / self.drafted, 4) if self.drafted else None
        speed = round(self.tokens / self.seconds, 1) if self.tokens and self.seconds else None
        return {
            "drafted": self.drafted, "accepted": self.accepted, "accepted_share": share,
            "tokens_per_second": speed,
        }  # fmt: skip


@dataclass(frozen=True)
class Answers:
    """Answers to a batch: ids without the end, the right answers' log-probabilities (B,), and the
    figures of a twig that drafted them."""

    ids: list[list[int]]
    logprob_B: np.ndarray
    drafts: DraftFigures | None = None
    kept: tuple[int, ...] = ()  # of each image, where images have budgets of their own


def answer_prefill(
    prefill: Prefill, right_BA: np.ndarray, ends: Collection[int], max_tokens: int,
    pipeline: Pipeline,
) -> Answers:  # fmt: skip
    """Greedy answers after a prefill, and the right answers' log-probabilities with their ends.

    Raises UserError where a log-probability is not finite.
    """
    logprob_B = likelihood(prefill, right_BA)
    kept = kept_of_images(prefill, pipeline)
    return Answers(greedy_answers(prefill, ends, max_tokens), logprob_B, kept=kept)


def kept_of_images(prefill: Prefill, pipeline: Pipeline) -> tuple[int, ...]:
    """How many tokens of each image were left, where each has a budget of its own; else none."""
    return prefill.trace.left_of_images() if pipeline.has_dynamic_budget else ()


def answer_batch(
    model: VLM, batch: QuestionBatch, pruner: Pipeline, K: int, ends: Collection[int],
    max_tokens: int,
) -> Answers:  # fmt: skip
    """The answers of one of our models with K of N visual tokens. Raises UserError."""
    prefill = model(batch.prompts, batch.pixels_IHW3, pruner, K)
    return answer_prefill(prefill, batch.right_BA, ends, max_tokens, pruner)


class EvaluatedVLM:
    """One of our models as an EvaluatedModel, for all these methods."""

    questions_at_once = 24

    def __init__(
        self, model: VLM, processor: Processor, pipelines: Sequence[Pipeline],
        max_pixels: int = MAX_PIXELS,
    ):  # fmt: skip
        self.max_pixels = max_pixels
        self.model, self.tower = share_tower(model, pipelines)
        self.processor, tokenizer = processor, processor.tokenizer
        self.encode, self.decode = tokenizer.encode, tokenizer.decode
        self.ends = tokenizer.eos_token_ids

    def prepare(self, question: Question) -> PreparedQuestion:
        return prepare_question(self.model, self.processor, question, self.max_pixels)

    def make_batch(self, prepared: Sequence[PreparedQuestion]) -> QuestionBatch:
        batch = QuestionBatch(self.model, prepared)
        self.tower.start(batch)
        return batch

    def answer(
        self, batch: QuestionBatch, pipeline: Pipeline, K: float, max_tokens: int
    ) -> Answers:
        return answer_batch(self.model, batch, pipeline, int(K), self.ends, max_tokens)
