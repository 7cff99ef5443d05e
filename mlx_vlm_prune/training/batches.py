"""Which examples each step reads: a new order in every pass over the data, from the seed alone.

So a run that goes on after a stop reads what it would have read. An example that cannot be used is
an error, or with `skip_bad` is left out, named and counted.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..checkpoints.config import VLMConfig
from ..checkpoints.errors import UserError
from ..inputs.image import open_image
from ..inputs.processor import Processor
from ..inputs.prompt import Prompt
from .examples import Example, TokenizedExample, tokenize_example
from .formats import Dataset

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """Examples that are read together; in numpy, for either framework.

    Shapes: I images over all prompts, A tokens of answers over all prompts.
    """

    prompts: list[Prompt]
    is_answer: list[np.ndarray]  # of every id of each prompt
    pixels_IHW3: np.ndarray | None
    indices: tuple[int, ...] = ()  # of the examples in the data set

    @classmethod
    def of(cls, examples: Sequence[TokenizedExample], pixels: Sequence[np.ndarray]) -> "Batch":
        pixels_IHW3 = np.stack(pixels) if pixels else None
        return cls([e.prompt for e in examples], [e.is_answer for e in examples], pixels_IHW3)

    @property
    def answer_tokens(self) -> int:
        """A."""
        return int(sum(flags[1:].sum() for flags in self.is_answer))

    @property
    def tokens(self) -> int:
        return sum(len(prompt.ids) for prompt in self.prompts)

    @property
    def targets_A(self) -> np.ndarray:
        """The ids of the answers; the first id of a prompt follows nothing, so it is none."""
        return np.concatenate([
            np.array(prompt.ids[1:])[flags[1:]]
            for prompt, flags in zip(self.prompts, self.is_answer, strict=True)
        ])  # fmt: skip


@dataclass
class Reader:
    """Turns examples of a data set into batches, and counts what it had to change."""

    dataset: Dataset
    processor: Processor
    config: VLMConfig  # of the model
    max_seq_length: int
    skip_bad: bool = False
    bad: dict[int, str] = field(default_factory=dict)  # what is wrong, by the example's number
    cut: set[int] = field(default_factory=set)  # examples that were too long

    def batch(self, indices: np.ndarray) -> Batch | None:
        """The examples of these numbers; None where none of them can be used.

        Raises UserError for one that cannot, without `skip_bad`.
        """
        examples, pixels = list[TokenizedExample](), list[np.ndarray]()
        for index in indices.tolist():
            try:
                read, pictures = self._read(self.dataset[index], index)
            except UserError as e:
                self._report(index, str(e))
                continue
            examples.append(read)
            pixels += pictures
        return Batch.of(examples, pixels) if examples else None

    def _read(self, example: Example, index: int) -> tuple[TokenizedExample, list[np.ndarray]]:
        try:
            read = tokenize_example(self.processor, example, self.config.N, self.max_seq_length)
            if fault := read.prompt.limit_error(self.max_seq_length, self.config.text.vocab_size):
                raise UserError(f"it {fault}")
            pictures = [
                self.processor.image(open_image(picture() if callable(picture) else picture))
                for picture in example.images
            ]
        except UserError as e:
            raise UserError(f"{example.where}: {e}") from None
        if read.was_cut:
            self.cut.add(index)
        return read, pictures

    def _report(self, index: int, fault: str) -> None:
        if not self.skip_bad:
            raise UserError(f"{fault} (skip_bad leaves such examples out)")
        if index not in self.bad:
            logger.warning("left out: %s", fault)
        self.bad[index] = fault


@dataclass(frozen=True)
class Order:
    """The numbers of the examples of every batch."""

    examples: int
    batch_size: int
    seed: int

    def indices(self, batch: int) -> np.ndarray:
        """The numbers (batch_size,) of a batch, counted from 0 over all passes."""
        first = batch * self.batch_size
        numbers = range(first, first + self.batch_size)
        return np.array([self._permutation(n // self.examples)[n % self.examples] for n in numbers])

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(self.examples)


def in_order(examples: int, batch_size: int, most: int) -> Iterator[np.ndarray]:
    """Batches of held-out examples, from the first; -1 for `most` is all."""
    batches = -(-examples // batch_size)
    for b in range(batches if most < 0 else min(most, batches)):
        yield np.arange(b * batch_size, min(examples, (b + 1) * batch_size))
