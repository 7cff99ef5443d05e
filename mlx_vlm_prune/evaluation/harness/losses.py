"""What lmms-eval calls `loglikelihood`: how well a given answer fits, for tasks of given choices.

The higher the better, says lmms-eval's interface; but its `multiple_choice` tasks take the choice
of the *least* value, since its models give the loss. So does this: the mean of the negative
log-probabilities of the answer's tokens and of the token that ends it, as its LLaVA has it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ...checkpoints.errors import UserError
from ...generation.stream import pipeline_for
from ...hosts.families import host_of
from ...hosts.families.pruner_defaults import plan_for_host
from ...inputs.budget import budget
from ...models.vlm import VLM
from ...pruners import Pipeline
from ..answers import EvaluatedVLM
from ..host_answers import EvaluatedHost
from ..questions import Question
from .answering import naming_question
from .options import RunOptions


@dataclass(frozen=True)
class Choice:
    """A question and one answer to it."""

    name: str
    text: str
    images: Sequence[Image.Image]
    answer: str


class ChoiceLosses:
    """Losses of given answers, by a model of ours or of mlx-vlm's. Raises UserError for a method or
    a budget that it cannot have."""

    def __init__(self, model: Any, processor: Any, options: RunOptions) -> None:
        self.evaluated: EvaluatedVLM | EvaluatedHost
        self.K: Any
        if isinstance(model, VLM):
            self.pipeline: Pipeline = pipeline_for(model, options.pruner)
            self.evaluated = EvaluatedVLM(model, processor, [self.pipeline])
            self.K = budget(model.N, options.keep_ratio, options.keep_tokens, self.pipeline)
        else:
            host = host_of(model, processor)
            self.pipeline = plan_for_host(host, options.pruner)
            self.evaluated = EvaluatedHost(host, [self.pipeline])
            self.K = options.keep_tokens or options.keep_ratio

    def of(self, choices: Sequence[Choice]) -> list[tuple[float, bool]]:
        """Of each choice its loss in nats, and whether a greedy answer is that one.

        Raises UserError, which names a question that is at fault.
        """
        prepared: list[Any] = []
        for choice in choices:
            with naming_question(choice.name):
                prepared.append(self.evaluated.prepare(_question(choice)))
        longest = max(len(each.right_ids) for each in prepared)
        with naming_question(choices[0].name):
            batch: Any = self.evaluated.make_batch(prepared)
            answers = self.evaluated.answer(batch, self.pipeline, self.K, longest)
        return [
            (-float(logprob) / len(each.right_ids), self._is_answer(ids, each.right_ids))
            for each, ids, logprob in zip(prepared, answers.ids, answers.logprob_B, strict=True)
        ]

    def _is_answer(self, ids: Sequence[int], right_ids: Sequence[int]) -> bool:
        """Did the model write the answer and then end?"""
        if right_ids[-1] in self.evaluated.ends:
            return [*ids] == [*right_ids[:-1]]
        return [*ids[: len(right_ids)]] == [*right_ids]


def _question(choice: Choice) -> Question:
    """As `evaluate` asks it. Raises UserError without a picture."""
    if not choice.images:
        raise UserError("it has no picture, and losses are of answers about pictures")
    first, *others = choice.images
    more: tuple[Any, ...] = tuple(others)
    return Question(choice.name, choice.text, (choice.answer,), lambda: first, more_images=more)
