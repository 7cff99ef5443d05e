"""Reads prompts of many conversations: features and rows of earlier prompts are not computed again.

What is known of a picture or of a row is found by what it depends on: the pixels, the methods and
their budgets, the words before. So it may come from any conversation, and a prompt with another
budget finds nothing that is not its own.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count

from ..inputs.processor import Processor
from ..machine.bounded_store import BoundedStore
from ..machine.clock import Clock
from ..models.pruning import ImageBatch
from ..models.vlm import VLM
from ..pruners import Pipeline, StepBudgets
from .conversation import Conversation, HeldPrompt, Picture, RowKey
from .request import Request
from .stream import PromptRead


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

    @contextmanager
    def reading(
        self, request: Request, clock: Clock
    ) -> Iterator[tuple[PromptRead, HeldPrompt | None]]:
        """A prompt that was read, and its rows as they can be kept later, with those of the answer;
        None where rows cannot be read again. Raises UserError; for values inside the block that are
        not finite, too."""
        pictures, prompt = self.open(request, clock)
        self.held = None
        with self.naming_faulty_part(pictures, prompt):
            read = self.read(request, pictures, prompt, clock)
            held, self.held = self.held, None
            yield read, held

    def keep(self, held: HeldPrompt) -> None:
        """Hold the rows of a prompt and its answer for later prompts."""
        self.rows.put(next(self._numbers), held, sum(layer.nbytes for layer in held.cache))

    def encode(self, picture: Picture, pipeline: Pipeline, budgets: StepBudgets) -> ImageBatch:
        """The tower's output; it is run where nobody had the same picture encoded so."""
        key = (picture.digest, self.encoding(pipeline, budgets))
        if (batch := self.features.get(key)) is None:
            batch = super().encode(picture, pipeline, budgets)
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
