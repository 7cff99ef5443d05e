"""The loss of answers, with any pruner between tower and language model.

Shapes: B prompts, I images over all prompts, A tokens of answers over all prompts, L rows,
D features, V words.
"""

import mlx.core as mx
import numpy as np
from mlx import nn

from ..models.splice import Spliced
from ..models.vlm import VLM
from ..pruners import Pipeline
from .batches import Batch


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
    decoded, _ = model.decode(
        model.splice_images(batch.prompts, pixels(batch, model.dtype), pipeline, K)
    )
    prompt_A, column_A = answer_rows(decoded.spliced, batch)
    logits_AV = model.language.logits(decoded.spliced.x_BLD[prompt_A, column_A])
    return cross_entropy_sum(logits_AV, mx.array(batch.targets_A))


def pixels(batch: Batch, dtype: mx.Dtype) -> mx.array | None:
    """The batch's images (I, H, W, 3), if any."""
    return None if batch.pixels_IHW3 is None else mx.array(batch.pixels_IHW3).astype(dtype)


def cross_entropy_sum(logits_AV: mx.array, targets_A: mx.array) -> mx.array:
    return nn.losses.cross_entropy(logits_AV.astype(mx.float32), targets_A, reduction="sum")
