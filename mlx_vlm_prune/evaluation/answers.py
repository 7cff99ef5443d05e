"""What a model with a pruner answers to a batch of questions, and how likely it finds the truth.

One prefill serves both: the right answer is read from the cache, the cache rewound,
and the model's own answer generated.

Shapes: B questions, I their images (one each), U different images among them, A tokens of the
longest right answer with its end, V words, H height, W width.
"""

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from ..checkpoints.errors import UserError
from ..generation.prefill import Prefill
from ..generation.steps import greedy_answers, likelihood
from ..inputs.image import open_image
from ..inputs.prompt import Prompt, build
from ..models.loading import Processor
from ..models.towers.between import Encoded
from ..models.vlm import VLM
from ..pruners import Pipeline, Reduction
from .questions import Question


@dataclass(frozen=True)
class Ready:
    """A question as the model reads it: ids, pixels, and the right answer's ids with its end."""

    prompt: Prompt
    pixels_HW3: np.ndarray
    right: list[int]


def picture(question: Question) -> Image.Image:
    """The image of a question, opened. Raises UserError where it cannot be, or has no answer."""
    if not question.answers:
        raise UserError("it has no answer")
    return open_image(question.image() if callable(question.image) else question.image)


def ready(model: VLM, processor: Processor, question: Question) -> Ready:
    """Open the image and build the prompt. Raises UserError, which says what is wrong with it."""
    image = picture(question)
    words = processor.tokenizer
    prompt = build(words, question.text, [model.N], processor.image_token)
    text = model.config.text
    if fault := prompt.too_much(text.max_position_embeddings, text.vocab_size):
        raise UserError(f"it {fault}")
    right = [*words.encode(question.answers[0]), *sorted(words.eos_token_ids)[:1]]
    return Ready(prompt, processor.image(image), right)


class Batch:
    """Questions, made ready once for all methods. Each picture is there once."""

    def __init__(self, model: VLM, asked: Sequence[Ready]):
        self.rows = [one.prompt for one in asked]
        found: dict[bytes, int] = {}
        which = [found.setdefault(one.pixels_HW3.tobytes(), len(found)) for one in asked]
        first = [which.index(u) for u in range(len(found))]
        self.which_I, self.first_U = mx.array(which), mx.array(first)
        pixels = mx.array(np.stack([one.pixels_HW3 for one in asked]))
        self.pixels_IHW3 = pixels.astype(model.dtype)
        A = max(len(one.right) for one in asked)
        self.right_BA = np.array([one.right + [-1] * (A - len(one.right)) for one in asked])
        self.sizes = [model.N] * len(asked)  # visual tokens of each question's image


class SharedTower:
    """A tower that encodes each picture of a batch once, and once for all methods behind it."""

    def __init__(self, tower: Any, want: Mapping[str, int | None]):
        self.tower, self.want = tower, dict(want)
        self.batch: Batch | None = None
        self.seen: Encoded | None = None

    def show(self, batch: Batch) -> None:
        self.batch, self.seen = batch, None

    def __call__(self, pixels_IHW3: mx.array, want: dict, cuts: Sequence) -> Encoded:
        assert self.batch
        is_whole = pixels_IHW3 is self.batch.pixels_IHW3
        if cuts or not is_whole or not want.items() <= self.want.items():
            return self._encode(pixels_IHW3, want, cuts)
        if self.seen is None:
            self.seen = self._encode(pixels_IHW3, self.want, ())
        return self.seen

    def _encode(self, pixels_IHW3: mx.array, want: dict, cuts: Sequence) -> Encoded:
        assert self.batch
        which_I = self.batch.which_I
        seen = self.tower(pixels_IHW3[self.batch.first_U], want, cuts)
        own = {name: signal[which_I] for name, signal in seen.signals.arrays.items()}
        kept = seen.kept
        if kept:
            parts = (kept.index_BK, kept.weight_BKN, kept.value_BND)
            kept = Reduction(*(None if part is None else part[which_I] for part in parts))
        return Encoded(seen.signals.replace(**own), kept)


def sharing(model: VLM, pipelines: Sequence[Pipeline]) -> tuple[VLM, SharedTower]:
    """The model with a tower that works once for all these methods; the one given is unchanged."""
    want: dict[str, int | None] = {}
    for pipeline in pipelines:
        want |= pipeline.signal_layers(model.config.vision.depth)
    shared = copy.copy(model)
    tower = SharedTower(model.tower, want)
    shared.tower = tower  # type: ignore[assignment]  # acts like one
    return shared, tower


@dataclass(frozen=True)
class Answers:
    """Answers to a batch: ids without the end, and the right answers' log-probabilities (B,)."""

    ids: list[list[int]]
    logprob_B: np.ndarray


def answers_of(
    prefill: Prefill, right_BA: np.ndarray, ends: Collection[int], max_tokens: int
) -> Answers:
    """What follows on prompts that were read, and how likely the right answers with their ends
    were. Raises UserError where the model gives no odds."""
    logprob_B = likelihood(prefill, right_BA)
    return Answers(greedy_answers(prefill, ends, max_tokens), logprob_B)


def answer(
    model: VLM, batch: Batch, pruner: Pipeline, K: int, ends: Collection[int], max_tokens: int
) -> Answers:
    """Of a model of ours with K of N visual tokens. Raises UserError where that cannot be."""
    prefill = model(batch.rows, batch.pixels_IHW3, pruner, K)
    return answers_of(prefill, batch.right_BA, ends, max_tokens)


class OwnRespondent:
    """A model of ours that is asked by all these methods."""

    def __init__(self, model: VLM, processor: Processor, pipelines: Sequence[Pipeline]):
        self.model, self.tower = sharing(model, pipelines)
        self.processor, words = processor, processor.tokenizer
        self.encode, self.decode, self.ends = words.encode, words.decode, words.eos_token_ids

    def ready(self, question: Question) -> Ready:
        return ready(self.model, self.processor, question)

    def begin(self, asked: Sequence[Ready]) -> Batch:
        batch = Batch(self.model, asked)
        self.tower.show(batch)
        return batch

    def answer(self, batch: Batch, pipeline: Pipeline, keep: float, max_tokens: int) -> Answers:
        return answer(self.model, batch, pipeline, int(keep), self.ends, max_tokens)
