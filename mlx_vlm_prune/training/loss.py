"""The loss of answers, with any pruner between tower and language model.

Shapes: B prompts, I images over all prompts, N visual tokens of each, K kept, A tokens of answers
over all prompts, L rows, D features, V words.
"""

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten

from ..models.cache import HeldRows
from ..models.language.minimind import ForwardPass
from ..models.layers import row_options
from ..models.splice import ImageSlots, Spliced, splice
from ..models.vlm import VLM
from ..pruners import Pipeline, Pruner, StepBudgets
from .batches import Batch
from .validation import ShortQuestions


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
    read = model.splice_images(batch.prompts, pixels(batch, model.dtype), pipeline, K)
    # Gradients need all rows at once, so a long prompt is not read in pieces.
    decoded, _ = model.decode(read, prefill_step_size=read.spliced.L)
    prompt_A, column_A = answer_rows(decoded.spliced, batch)
    logits_AV = model.language.logits(decoded.spliced.x_BLD[prompt_A, column_A])
    return cross_entropy_sum(logits_AV, mx.array(batch.targets_A))


def pixels(batch: Batch | ShortQuestions, dtype: mx.Dtype) -> mx.array | None:
    """The batch's images (I, H, W, 3), if any."""
    return None if batch.pixels_IHW3 is None else mx.array(batch.pixels_IHW3).astype(dtype)


def cross_entropy_sum(logits_AV: mx.array, targets_A: mx.array) -> mx.array:
    return nn.losses.cross_entropy(logits_AV.astype(mx.float32), targets_A, reduction="sum")


def factor_loss(
    model: VLM, batch: Batch, step: Pruner, K: int, noise: float
) -> tuple[mx.array, mx.array]:
    """The loss while a method's choice is soft, summed over the answers' tokens; and the part of it
    that is the answers' cross-entropy.

    Every visual token is there; those that the method would drop get next to no attention: the
    language model's `forward_pass` must be `OthersBias`. What
    chooses is no lesson for the tower: its gradients are only guesses.
    """
    pixels_IHW3 = pixels(batch, model.dtype)
    assert pixels_IHW3 is not None, "there are images"
    pipeline = Pipeline.of(step)
    images = model.encode(pixels_IHW3, pipeline, StepBudgets(model.N, model.N, ()))
    if pipeline.needs_signal("text"):
        (images,) = model.add_text([images], batch.prompts)
    signals = images.signals.constant
    x_IND = model.project(images, Pipeline.of(step)).signals.x_BND

    def loss_of(bias_IN: mx.array) -> mx.array:
        return _biased_loss(model, batch, x_IND, bias_IN)

    method, weights = step.method, step.weights
    assert method.training_factor
    loss = answers = loss_of(mx.log(method.training_factor(weights, signals, K, noise)))
    if method.training_loss:
        no_bias_IN = mx.zeros(x_IND.shape[:2])
        full_loss, gradient_IN = mx.value_and_grad(loss_of)(no_bias_IN)
        beside = method.training_loss(weights, signals, mx.stop_gradient(gradient_IN))
        loss = loss + batch.answer_tokens * beside
        if tree_flatten(model.trainable_parameters()):
            loss = loss + full_loss
    return loss, answers


def _biased_loss(model: VLM, batch: Batch, x_IND: mx.array, bias_IN: mx.array) -> mx.array:
    """With all visual tokens; `bias_IN` is added to the attention that others pay to each."""
    language, every_N = model.language, mx.arange(x_IND.shape[1])
    slots = [ImageSlots(x_ND, every_N, bias_N) for x_ND, bias_N in zip(x_IND, bias_IN, strict=True)]
    spliced = splice(language.embed_tokens, batch.prompts, slots, "keep")
    x_BLD = language.run(
        range(language.depth), spliced.x_BLD, spliced.positions_BL, language.make_cache(),
        **row_options(spliced),
    )  # fmt: skip
    prompt_A, column_A = answer_rows(spliced, batch)
    logits_AV = language.logits(x_BLD[prompt_A, column_A])
    return cross_entropy_sum(logits_AV, mx.array(batch.targets_A))


class OthersBias(ForwardPass):
    """A forward pass in which a bias holds for what other rows pay: a row sees itself without it.

    A row that is dropped has no attention of others, yet a gradient, for which its own hidden state
    must be what it would be if it stayed.
    """

    def _mask(self, held: HeldRows, dtype: mx.Dtype) -> mx.array | str | None:
        if held.bias_BS is None:
            return super()._mask(held, dtype)
        L = self.positions_BL.shape[1]
        assert held.rows == L, "all rows are read at once"
        bias_BLL = mx.where(mx.eye(L, dtype=mx.bool_), 0, held.bias_BS[:, None])
        visible_B1LL = self.visible(held.positions_BS)
        return mx.where(visible_B1LL, bias_BLL[:, None], -mx.inf).astype(dtype)
