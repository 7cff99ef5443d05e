"""Reads prompts of many conversations: features and rows of earlier prompts are not computed again.

What is known of a picture or of a row is found by what it depends on: the pixels, the methods and
their budgets, the words before. So it may come from any conversation, and a prompt with another
budget finds nothing that is not its own.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import count

import mlx.core as mx

from ..inputs.processor import Processor
from ..machine.bounded_store import BoundedStore
from ..models.pruning import ImageBatch
from ..models.vlm import VLM
from ..pruners import Pipeline, StepBudgets
from .conversation import Conversation, HeldPrompt, Picture, RowKey


class PromptReader(Conversation):
    """Reads prompts one after another; `most_bytes` is what it holds of earlier ones, half of it
    the tower's features and half the layers' rows."""

    def __init__(self, model: VLM, processor: Processor, most_bytes: int) -> None:
        self.features = BoundedStore[ImageBatch](most_bytes // 2)
        self.rows = BoundedStore[HeldPrompt](most_bytes // 2)
        self._numbers = count()
        super().__init__(model, processor)

    def clear(self) -> None:
        """Forget all images and rows."""
        super().clear()
        self.features.clear()
        self.rows.clear()

    def take_rows(self) -> HeldPrompt | None:
        """The rows of the prompt that was read last, which `keep` can hold later with those of its
        answer; None where rows cannot be read again, or nothing is held."""
        held, self.held = self.held, None
        return held if self.rows.most_bytes else None

    def keep(self, held: HeldPrompt) -> None:
        """Hold the rows of a prompt and its answer for later prompts."""
        mx.async_eval([layer.arrays for layer in held.cache])  # not what they are computed from
        self.rows.put(next(self._numbers), held, sum(layer.nbytes for layer in held.cache))

    def encode(self, picture: Picture, pipeline: Pipeline, budgets: StepBudgets) -> ImageBatch:
        """The tower's output; it is run where nobody had the same picture encoded so."""
        key = (picture.digest, self.encoding(pipeline, budgets))
        if (batch := self.features.get(key)) is None:
            batch = super().encode(picture, pipeline, budgets)
            mx.async_eval(batch.arrays)  # what is held must not hold what it is computed from
            self.features.put(key, batch, batch.nbytes)
        return batch

    def reusable(self, held: HeldPrompt | None, keys: Sequence[RowKey]) -> HeldPrompt | None:
        """A copy of the held rows with which most rows of a prompt begin."""
        lengths = {number: rows.common_rows(keys) for number, rows in self.rows}
        if not lengths or not max(lengths.values()):
            return None
        best = max(lengths, key=lambda number: lengths[number])
        rows = self.rows.get(best)
        assert rows is not None
        if lengths[best] == min(layer.rows for layer in rows.cache):
            self.rows.drop(best)  # the longer prompt will have them all
        return replace(rows, cache=[layer.fork() for layer in rows.cache])
