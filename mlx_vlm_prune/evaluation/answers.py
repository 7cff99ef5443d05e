"""What a model with a pruner answers to a batch of questions, and how likely it finds the truth.

One prefill serves both: the right answer is read from the cache, the cache rewound,
and the model's own answer generated.

Shapes: B questions, I their images (one each), U different images among them, A tokens of the
longest right answer with its end, V words, H height, W width.
"""

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ..checkpoints.errors import UserError
from ..image import open_image
from ..loading import Processor
from ..model import VLM, Prefill
from ..prompt import Prompt, build
from ..pruners import Pipeline, Reduction
from ..questions import Question
from ..towers.between import Encoded


@dataclass(frozen=True)
class Ready:
    """A question as the model reads it: ids, pixels, and the right answer's ids with its end."""

    prompt: Prompt
    pixels_HW3: np.ndarray
    right: list[int]


def ready(model: VLM, processor: Processor, question: Question) -> Ready:
    """Open the image and build the prompt. Raises UserError, which says what is wrong with it."""
    if not question.answers:
        raise UserError("it has no answer")
    image = question.image() if callable(question.image) else question.image
    words = processor.tokenizer
    prompt = build(words, question.text, [model.N], processor.image_token)
    text = model.config.text
    if fault := prompt.too_much(text.max_position_embeddings, text.vocab_size):
        raise UserError(f"it {fault}")
    right = [*words.encode(question.answers[0]), *sorted(words.eos_token_ids)[:1]]
    return Ready(prompt, processor.image(open_image(image)), right)


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
        want |= pipeline.want(model.config.vision.depth)
    shared = copy.copy(model)
    tower = SharedTower(model.tower, want)
    shared.tower = tower  # type: ignore[assignment]  # acts like one
    return shared, tower


@dataclass(frozen=True)
class Said:
    """Answers to a batch: ids without the end, and the right answers' log-probabilities (B,)."""

    ids: list[list[int]]
    logprob_B: np.ndarray


class Own:
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

    def answer(self, batch: Batch, pipeline: Pipeline, keep: float, max_tokens: int) -> Said:
        return answer(self.model, batch, pipeline, int(keep), self.ends, max_tokens)


def answer(
    model: VLM, batch: Batch, pruner: Pipeline, K: int, ends: Collection[int], max_tokens: int
) -> Said:
    """What the model says with K of N visual tokens. Raises UserError where that cannot be."""
    before = model(batch.rows, batch.pixels_IHW3, pruner, K)
    with unchanged(before):
        logprob_B = likelihood(model, batch.right_BA, before)
    return Said(greedy(model, before, ends, max_tokens), logprob_B)


@contextmanager
def unchanged(before: Prefill) -> Iterator[None]:
    """What is read inside is forgotten afterwards."""
    held = [layer.rows for layer in before.cache]
    yield
    for layer, rows in zip(before.cache, held, strict=True):
        layer.rewind(rows)


def likelihood(model: VLM, right_BA: np.ndarray, before: Prefill) -> np.ndarray:
    """Log-probabilities (B,) of answers with their ends: the sums over their tokens. -1 pads."""
    right = mx.array(np.maximum(right_BA, 0))
    logits_BAV = before.logits_BLV[:, -1:]
    if right_BA.shape[1] > 1:
        after_BAV = model.step(right[:, :-1], before.next_B1, before)
        logits_BAV = mx.concatenate([logits_BAV, after_BAV], axis=1)
    logits_BAV = logits_BAV.astype(mx.float32)
    own_BA = mx.take_along_axis(logits_BAV, right[..., None], axis=-1)[..., 0]
    told_BA = np.array(own_BA - mx.logsumexp(logits_BAV, axis=-1)).astype(np.float64)
    logprob_B = np.where(right_BA >= 0, told_BA, 0).sum(axis=1)
    if not np.isfinite(logprob_B).all():
        raise UserError("the language model gave NaN or infinite odds; try --dtype float32")
    return logprob_B


def greedy(model: VLM, before: Prefill, ends: Collection[int], max_tokens: int) -> list[list[int]]:
    """The likeliest next token, again and again, until every answer ended."""
    token_B1 = mx.argmax(before.logits_BLV[:, -1], axis=-1, keepdims=True)
    position_B1 = before.next_B1
    said: list[list[int]] = [[] for _ in before.lengths]
    running = set(range(len(said)))
    for n in range(1, max_tokens + 1):
        tokens = np.array(token_B1)[:, 0].tolist()
        running -= {b for b in running if tokens[b] in ends}
        for b in running:
            said[b].append(tokens[b])
        if not running or n == max_tokens:
            break
        logits_BV = model.step(token_B1, position_B1, before)[:, -1]
        token_B1, position_B1 = mx.argmax(logits_BV, axis=-1, keepdims=True), position_B1 + 1
    return said
