"""What a model says to held-out examples: the loss of their answers, and how many are right.

Shapes: B prompts, I images over all prompts.
"""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..checkpoints.errors import UserError
from ..generation.steps import greedy_answers
from ..inputs.prompt import Prompt
from ..models.vlm import VLM
from ..pruners import Pipeline, plan
from .batches import Batch, Reader, in_order
from .learner import Learner
from .processes import Processes

LONGEST_ANSWER = 32  # tokens; longer ones are not compared word by word
SPARE_TOKENS = 4  # beyond the right answer


@dataclass(frozen=True)
class ShortQuestions:
    """The first question of each example of a batch whose answer is short."""

    prompts: list[Prompt]
    right: list[list[int]]  # token ids of the answers, with their ends
    pixels_IHW3: np.ndarray | None

    @classmethod
    def of(cls, batch: Batch) -> "ShortQuestions":
        """Examples with an image behind the first answer are left out."""
        prompts, right, images, image = list[Prompt](), list[list[int]](), list[int](), 0
        for prompt, flags in zip(batch.prompts, batch.is_answer, strict=True):
            begin = int(np.argmax(flags))
            length = int(np.argmin(np.append(flags[begin:], False)))
            numbers = range(image, image := image + len(prompt.runs))
            is_early = all(start + n <= begin for start, n in prompt.runs)
            if begin and length <= LONGEST_ANSWER and is_early:
                prompts.append(Prompt(prompt.ids[:begin], prompt.runs))
                right.append(list(prompt.ids[begin : begin + length]))
                images += numbers
        pixels = None if batch.pixels_IHW3 is None or not images else batch.pixels_IHW3[images]
        return cls(prompts, right, pixels)


def validate(
    learner: Learner, reader: Reader, batch_size: int, most: int, processes: Processes,
    is_stopped: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:  # fmt: skip
    """Figures of held-out examples, of at most so many batches; None where it was stopped.

    `val_loss` is the mean of an answer's token, `val_accuracy` the share of the `val_questions`
    answered exactly, by greedy generation with all visual tokens; `val_accuracy_pruned` the same
    behind the learner's pruner; both where the learner counts answers. Raises UserError where no
    example can be used.
    """
    sums = np.zeros(5)  # loss, tokens, right, right where pruned, questions
    batches = list(in_order(len(reader.dataset), batch_size, most))
    learner.eval()
    try:
        with processes.together():
            for indices in batches[processes.rank :: processes.size]:
                if is_stopped() and processes.size == 1:
                    return None
                if batch := reader.batch(indices):
                    sums[0] += float(learner.loss(batch).item())  # type: ignore[arg-type]
                    sums[1] += batch.answer_tokens
                    sums[2:] += _count_right(learner, reader, ShortQuestions.of(batch))
    finally:
        learner.train()
    loss, tokens, full, pruned, questions = processes.sum(sums.tolist())
    if not tokens:
        raise UserError("no held-out example can be used")
    figures = {"val_loss": loss / tokens}
    if questions:
        figures |= {"val_accuracy": full / questions, "val_questions": questions}
        if learner.pipeline.spec != "none":
            figures["val_accuracy_pruned"] = pruned / questions
    return figures


def _count_right(
    learner: Learner, reader: Reader, questions: ShortQuestions
) -> tuple[int, int, int]:
    """Answers that are right with all visual tokens and pruned, and how many were asked."""
    model = learner.model
    if not (questions.prompts and learner.counts_answers):
        return 0, 0, 0
    full = _right(model, reader, questions, plan("none", {}), model.N)
    pipeline, pruned = learner.pipeline, full
    if pipeline.spec != "none":
        pruned = _right(model, reader, questions, pipeline, learner.K)
    return full, pruned, len(questions.prompts)


def _right(
    model: VLM, reader: Reader, questions: ShortQuestions, pipeline: Pipeline, K: int
) -> int:
    tokenizer, pixels = reader.processor.tokenizer, questions.pixels_IHW3
    pixels_IHW3 = None if pixels is None else mx.array(pixels).astype(model.dtype)
    prefill = model(questions.prompts, pixels_IHW3, pipeline, K)
    most = max(map(len, questions.right)) + SPARE_TOKENS
    answers = greedy_answers(prefill, tokenizer.eos_token_ids, most)
    right = [
        [token for token in ids if token not in tokenizer.eos_token_ids] for ids in questions.right
    ]
    decode = tokenizer.decode
    pairs = zip(answers, right, strict=True)
    return sum(decode(answer).strip() == decode(ids).strip() for answer, ids in pairs)
