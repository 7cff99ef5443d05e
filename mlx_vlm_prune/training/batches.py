"""Which examples each step reads: a new order in every pass over the data, from the seed alone.

So a run that goes on after a stop reads what it would have read. An example that cannot be used is
an error, or with `skip_bad` is left out, named and counted.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from ..checkpoints.config import VLMConfig
from ..checkpoints.errors import UserError
from ..inputs.image import open_image
from ..inputs.processor import Processor
from ..inputs.prompt import Prompt
from .examples import Example, Picture, TokenizedExample, tokenize_example
from .formats import Dataset

logger = logging.getLogger(__name__)
AHEAD = 2  # batches that a trainer has read while one is in use
WINDOW = 16  # blocks of a data set whose examples are shuffled together


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
    def of(
        cls, examples: Sequence[TokenizedExample], pixels: Sequence[np.ndarray],
        indices: Sequence[int] = (),
    ) -> "Batch":  # fmt: skip
        pixels_IHW3 = np.stack(pixels) if pixels else None
        flags = [e.is_answer for e in examples]
        return cls([e.prompt for e in examples], flags, pixels_IHW3, tuple(indices))

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


@dataclass(frozen=True)
class _Read:
    """What reading a batch gave."""

    batch: Batch | None
    bad: dict[int, str]
    cut: list[int]


@dataclass
class Reader:
    """Turns examples of a data set into batches, and counts what it had to change.

    `chat_template_config` holds the template's own options. Raises UserError for a tokenizer with
    ids that the model has no embedding for. A class for other models defines `check_tokenizer`,
    `read_example` and `join`.
    """

    dataset: Dataset
    processor: Processor
    config: VLMConfig  # of the model
    max_seq_length: int
    skip_bad: bool = False
    chat_template_config: Mapping[str, Any] = field(default_factory=dict)
    bad: dict[int, str] = field(default_factory=dict)  # what is wrong, by the example's number
    cut: set[int] = field(default_factory=set)  # examples that were too long
    _ahead: dict[bytes, Future[_Read]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.check_tokenizer()
        if self.longest and self.max_seq_length > self.longest:
            logger.info("max_seq_length is %d, the most that the model reads", self.longest)
            self.max_seq_length = self.longest

    @property
    def longest(self) -> int | None:
        """How many ids the model reads."""
        return self.config.text.max_position_embeddings

    def check_tokenizer(self) -> None:
        """Raises UserError for ids beyond the vocabulary."""
        # Special tokens may lie behind the vocabulary, as <image> of LLaVA's authors: no text has
        # one, and an example that has is refused.
        backend = self.processor.tokenizer.backend
        added = {token.content for token in backend.get_added_tokens_decoder().values()}
        words = backend.get_vocab()
        largest = max((words[word] for word in words.keys() - added), default=0)
        if largest >= (size := self.config.text.vocab_size):
            raise UserError(
                f"the tokenizer of {self.processor.tokenizer.name} has ids up to {largest}, but the"
                f" model's vocabulary has {size} entries"
            )

    def batch(self, indices: np.ndarray, ahead: Iterable[np.ndarray] = ()) -> Batch | None:
        """The examples of these numbers; None where none of them can be used.

        The batches in `ahead`, which come next, are read meanwhile. Raises UserError for an example
        that cannot be used, without `skip_bad`, when its batch is due.
        """
        reading = self._ahead.pop(indices.tobytes(), None)
        read = reading.result() if reading else self._read(indices)
        for following in ahead:
            if (key := following.tobytes()) not in self._ahead:
                self._ahead[key] = self._pool.submit(self._read, following)
        return self._count(read)

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, thread_name_prefix="reading ahead")

    def _count(self, read: _Read) -> Batch | None:
        for index, fault in read.bad.items():
            if not self.skip_bad:
                raise UserError(f"{fault} (skip_bad leaves such examples out)")
            if index not in self.bad:
                logger.warning("left out: %s", fault)
            self.bad[index] = fault
        self.cut.update(read.cut)
        return read.batch

    def _read(self, indices: np.ndarray) -> _Read:
        numbers, examples, pictures = list[int](), list[TokenizedExample](), list[Any]()
        bad = dict[int, str]()
        for index in indices.tolist():
            try:
                read, pixels = self._prepare(self.dataset[index])
            except UserError as e:
                bad[index] = str(e)
                if not self.skip_bad:
                    break
                continue
            numbers.append(index)
            examples.append(read)
            pictures += pixels
        cut = [n for n, example in zip(numbers, examples, strict=True) if example.was_cut]
        return _Read(self.join(examples, pictures, numbers) if examples else None, bad, cut)

    def _prepare(self, example: Example) -> tuple[TokenizedExample, Sequence[Any]]:
        """An example as the model reads it. Raises UserError, which names the record."""
        try:
            return self.read_example(example)
        except UserError as e:
            raise UserError(f"{example.where}: {e}") from None

    def read_example(self, example: Example) -> tuple[TokenizedExample, Sequence[Any]]:
        """Ids, and what the tower sees of every picture. Raises UserError."""
        read = tokenize_example(
            self.processor, example, self.config.N, self.max_seq_length, self.chat_template_config
        )
        words_L = np.array(read.prompt.ids)
        for start, length in read.prompt.runs:
            words_L[start : start + length] = 0
        if (largest := int(words_L.max())) >= self.config.text.vocab_size:
            token = self.processor.tokenizer.backend.id_to_token(largest)
            raise UserError(f"its text holds {token}, for which the model has no embedding")
        pictures = example.images[: len(read.prompt.runs)]
        return read, [self.processor.image(open_picture(picture)) for picture in pictures]

    def join(
        self, examples: Sequence[TokenizedExample], pictures: Sequence[Any], numbers: Sequence[int]
    ) -> Batch:
        """The batch of some examples and all their pictures, each as it was read."""
        return Batch.of(examples, pictures, numbers)


def open_picture(picture: Picture) -> Image.Image:
    return open_image(picture() if callable(picture) else picture)


@dataclass
class Sampler:
    """The numbers of the examples of every batch.

    Where a data set is read in `blocks`, lists of these are shuffled, and then the examples of
    every WINDOW blocks: neighbours in the file stay near each other, and few blocks are held.
    """

    examples: int
    batch_size: int
    seed: int
    blocks: Sequence[Sequence[range]] | None = None
    _epoch: tuple[int, np.ndarray] = field(default=(-1, np.empty(0, int)), repr=False)

    def indices(self, batch: int) -> np.ndarray:
        """The numbers (batch_size,) of a batch, counted from 0 over all passes."""
        first = batch * self.batch_size
        numbers = range(first, first + self.batch_size)
        return np.array([self._permutation(n // self.examples)[n % self.examples] for n in numbers])

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._epoch[0] != epoch:
            self._epoch = epoch, self._shuffled(np.random.default_rng([self.seed, epoch]))
        return self._epoch[1]

    def _shuffled(self, rng: np.random.Generator) -> np.ndarray:
        if self.blocks is None:
            return rng.permutation(self.examples)
        blocks = [block for n in rng.permutation(len(self.blocks)) for block in self.blocks[n]]
        windows = (blocks[n : n + WINDOW] for n in range(0, len(blocks), WINDOW))
        return np.concatenate([rng.permutation(np.concatenate(window)) for window in windows])


def in_order(examples: int, batch_size: int, most: int) -> Iterator[np.ndarray]:
    """Batches of held-out examples, from the first; -1 for `most` is all."""
    batches = -(-examples // batch_size)
    for b in range(batches if most < 0 else min(most, batches)):
        yield np.arange(b * batch_size, min(examples, (b + 1) * batch_size))
