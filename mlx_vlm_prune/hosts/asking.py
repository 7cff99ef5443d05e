"""A model of mlx-vlm's that an evaluation asks: what it answers, and how likely it finds the truth.

The tower sees a picture once for all methods. mlx-vlm's own loop reads the prompt; its language
model then goes on from a copy of the cache, once with the right answer and once by itself.

Shapes: B questions, V words.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np

from ..checkpoints.errors import UserError
from ..evaluation.answers import Said
from ..image import open_image
from ..model import no_lap
from ..pruners import METHODS, Pipeline, Stage, plan
from ..questions import Question
from .deep import Read
from .families.inner import Ahead
from .mlx_vlm import Told, as_it_was, budgets, family_of, hear, stream
from .refusals import check
from .stream import fewer, prepared
from .views import Inputs, View


@dataclass(frozen=True)
class Ready:
    """A question as the model reads it, and the right answer's ids with its end."""

    inputs: Inputs
    right: list[int]


@dataclass(frozen=True)
class Batch:
    """Questions, and what the tower saw of each one's picture."""

    asked: Sequence[Ready]
    views: list[list[View]]
    sizes: list[int]  # visual tokens of each


class Host:
    """A model of mlx-vlm's that is asked by all these methods."""

    def __init__(self, model: Any, processor: Any, pipelines: Sequence[Pipeline]):
        self.model, self.processor, self.family = model, processor, family_of(model)
        self.words = getattr(processor, "tokenizer", processor)
        self.ends = set(self.words.stopping_criteria.eos_token_ids)
        self.want: dict[str, int | None] = {}
        for pipeline in pipelines:
            if self._policy(pipeline) and (layers := self.family.depth(model)):
                self.want |= pipeline.want(layers)

    def encode(self, text: str) -> list[int]:
        return list(self.words.encode(text, add_special_tokens=False))

    def decode(self, ids: list[int]) -> str:
        return str(self.words.decode(ids))

    def ready(self, question: Question) -> Ready:
        """Raises UserError, which says what is wrong with the question."""
        if not question.answers:
            raise UserError("it has no answer")
        image = question.image() if callable(question.image) else question.image
        inputs = prepared(self.model, self.processor, question.text, [open_image(image)])
        end = getattr(self.words, "eos_token_id", None)
        ends = [end] if end in self.ends else sorted(self.ends)[:1]
        right = [*self.encode(question.answers[0]), *ends]
        if not right:
            raise UserError("its answer is empty, and the tokenizer has no token that ends one")
        return Ready(inputs, right)

    def begin(self, asked: Sequence[Ready]) -> Batch:
        views = []
        with stream():
            for one in asked:
                views.append(self.family.see(self.model, one.inputs, self.want))
                mx.eval([_arrays(view) for view in views[-1]])
        sizes = [sum(view.signals.x_BND.shape[1] for view in own) for own in views]
        return Batch(asked, views, sizes)

    def answer(self, batch: Batch, pipeline: Pipeline, keep: float, max_tokens: int) -> Said:
        """With `keep` tokens of an image, all where it has fewer, or with that share of them.

        Raises UserError where that cannot be.
        """
        policy = check(self.model, self.family, pipeline, None)
        ids, odds = [], []
        for one, seen, N in zip(batch.asked, batch.views, batch.sizes, strict=True):
            share, K = (None, min(keep, N)) if isinstance(keep, int) else (keep, None)
            with as_it_was(self.model.language_model), stream():
                views = hear(self.model, one.inputs, seen, pipeline)
                kept = budgets(views, share, K, pipeline)
                told, deep = fewer(
                    self.model, one.inputs, views, pipeline, kept, policy, None, no_lap
                )
                first_V, cache = self._prefilled(told, deep)
                odds.append(self._likelihood(one.right, first_V, _copied(cache)))
                ids.append(self._greedy(first_V, cache, max_tokens))
        if not np.isfinite(odds).all():
            raise UserError("the language model gave NaN or infinite odds; try --dtype float32")
        return Said(ids, np.array(odds))

    def _policy(self, pipeline: Pipeline) -> str | None:
        try:
            return check(self.model, self.family, pipeline, None)
        except UserError:
            return None  # `answer` says why

    def _prefilled(self, told: Told, deep: Read | None) -> tuple[np.ndarray, list[Any]]:
        """Log-probabilities (V,) of the first word, and the prompt's cache."""
        from mlx_vlm.generate.ar import generate_step
        from mlx_vlm.models.cache import make_prompt_cache

        cache = deep.cache if deep else make_prompt_cache(self.model.language_model)
        rest = dict(deep.arguments if deep else told.arguments)
        ids, pixels, mask = (rest.pop(x, None) for x in ("input_ids", "pixel_values", "mask"))
        heard: list[mx.array] = []

        def first(odds_1V: mx.array) -> mx.array:
            heard.append(odds_1V)
            return mx.argmax(odds_1V, axis=-1)

        none_more = generate_step(
            ids, self.model, pixels, mask, max_tokens=0, sampler=first, prompt_cache=cache, **rest
        )
        said = list(none_more)
        assert not said and len(heard) == 1
        return _plain(heard[0][0]), cache

    def _next(self, token: int, cache: list[Any]) -> np.ndarray:
        """Log-probabilities (V,) of the word after one more."""
        logits_V = self.model.language_model(mx.array([[token]]), cache=cache).logits[0, -1]
        return _plain(logits_V - mx.logsumexp(logits_V))

    def _likelihood(self, right: list[int], odds_V: np.ndarray, cache: list[Any]) -> float:
        """Log-probability of an answer with its end."""
        total = float(odds_V[right[0]])
        for token, after in pairwise(right):
            total += float(self._next(token, cache)[after])
        return total

    def _greedy(self, odds_V: np.ndarray, cache: list[Any], max_tokens: int) -> list[int]:
        """The likeliest word, again and again, until the answer ends."""
        said: list[int] = []
        while (token := int(odds_V.argmax())) not in self.ends:
            said.append(token)
            if len(said) == max_tokens:
                break
            odds_V = self._next(token, cache)
        return said


def usual(model: Any) -> list[str]:
    """All methods that can prune this model."""
    family, able = family_of(model), []
    for name, method in METHODS.items():
        if method.stage is Stage.ENHANCER or method.learned or name == "none":
            continue
        try:
            check(model, family, plan(name), None)
        except UserError:
            continue
        able.append(name)
    return able


def _plain(odds_V: mx.array) -> np.ndarray:
    return np.array(odds_V.astype(mx.float32))


def _arrays(view: View) -> Iterator[mx.array]:
    yield from (*view.signals.arrays.values(), *view.deep)


def _copied(cache: Sequence[Any]) -> list[Any]:
    """Rows that come to the copy are not in the original."""
    return [Ahead(_copy(one.cache), one.by) if isinstance(one, Ahead) else _copy(one)
            for one in cache]  # fmt: skip


def _copy(layer: Any) -> Any:
    own = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, mx.array):
            setattr(own, name, mx.array(value))
    return own
