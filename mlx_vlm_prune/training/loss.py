"""The loss of answers, with any pruner between tower and language model.

Shapes: B prompts, I images over all prompts, A tokens of answers over all prompts, L rows,
D features, V words.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from mlx import nn

from ..inputs.prompt import Prompt
from ..models.splice import Spliced
from ..models.vlm import VLM
from ..pruners import Pipeline
from .examples import TokenizedExample


@dataclass(frozen=True)
class Batch:
    """Examples that are read together."""

    prompts: list[Prompt]
    is_answer: list[np.ndarray]  # of every id of each prompt
    pixels_IHW3: mx.array | None
    indices: tuple[int, ...] = ()  # of the examples in the data set

    @classmethod
    def of(
        cls, examples: Sequence[TokenizedExample], pixels: Sequence[np.ndarray], dtype: mx.Dtype
    ) -> "Batch":
        pixels_IHW3 = mx.array(np.stack(pixels)).astype(dtype) if pixels else None
        return cls([e.prompt for e in examples], [e.is_answer for e in examples], pixels_IHW3)

    @property
    def answer_tokens(self) -> int:
        """A."""
        return int(sum(flags[1:].sum() for flags in self.is_answer))

    @property
    def tokens(self) -> int:
        return sum(len(prompt.ids) for prompt in self.prompts)

    @property
    def targets_A(self) -> mx.array:
        """The ids of the answers; the first id of a prompt follows nothing, so it is none."""
        return mx.array(np.concatenate([
            np.array(prompt.ids[1:])[flags[1:]]
            for prompt, flags in zip(self.prompts, self.is_answer, strict=True)
        ]))  # fmt: skip


def answer_rows(spliced: Spliced, batch: Batch) -> tuple[mx.array, mx.array]:
    """The rows (prompt, column) after which the answers' tokens are to be said, (A,) each.

    Rows are those that pruning left: the one before a word's own.
    """
    prompts, columns = [], []
    pairs = zip(batch.prompts, batch.is_answer, spliced.word_columns, strict=True)
    for b, (prompt, flags, word_columns) in enumerate(pairs):
        is_word = np.ones(len(prompt.ids), bool)
        for start, length in prompt.runs:
            is_word[start : start + length] = False
        flags = flags.copy()
        flags[0] = False
        before = np.array(word_columns)[flags[is_word]] - 1
        columns.append(before)
        prompts.append(np.full(len(before), b))
    return mx.array(np.concatenate(prompts)), mx.array(np.concatenate(columns))


def answer_loss(model: VLM, batch: Batch, pipeline: Pipeline, K: int) -> mx.array:
    """Cross-entropy of the answers, summed over their A tokens."""
    decoded, _ = model.decode(model.splice_images(batch.prompts, batch.pixels_IHW3, pipeline, K))
    prompt_A, column_A = answer_rows(decoded.spliced, batch)
    logits_AV = model.language.logits(decoded.spliced.x_BLD[prompt_A, column_A])
    return cross_entropy_sum(logits_AV, batch.targets_A)


def cross_entropy_sum(logits_AV: mx.array, targets_A: mx.array) -> mx.array:
    return nn.losses.cross_entropy(logits_AV.astype(mx.float32), targets_A, reduction="sum")
