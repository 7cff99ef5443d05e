"""A model of mlx-vlm's in an evaluation. The tower sees a picture once for all methods.

Shapes: B questions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..checkpoints.errors import UserError
from ..hosts.compatibility import check_pipeline
from ..hosts.host import Host, generation_stream
from ..hosts.prefill import HostPrefill, prefill_through_cuts
from ..hosts.prepared_inputs import PreparedInputs
from ..hosts.prompt import add_text, budgets_by_view, prepare_prompt, prune_prompt
from ..hosts.views import View
from ..pruners import METHODS, Pipeline, Stage, plan
from .answers import Answers, answers_of, picture
from .questions import Question


@dataclass(frozen=True)
class Ready:
    """A question as the model reads it, and the right answer's ids with its end."""

    inputs: PreparedInputs
    right: list[int]


@dataclass(frozen=True)
class Batch:
    """Questions, and what the tower saw of each one's picture."""

    asked: Sequence[Ready]
    views: list[list[View]]
    sizes: list[int]  # visual tokens of each


class HostRespondent:
    """A model of mlx-vlm's that answers with all these methods."""

    def __init__(self, host: Host, pipelines: Sequence[Pipeline]):
        self.host = host
        self.words = getattr(host.processor, "tokenizer", host.processor)
        self.ends = set(self.words.stopping_criteria.eos_token_ids)
        self.want: dict[str, int | None] = {}
        for pipeline in pipelines:
            if self._policy(pipeline) and (layers := host.depth):
                self.want |= pipeline.signal_layers(layers)

    def encode(self, text: str) -> list[int]:
        return list(self.words.encode(text, add_special_tokens=False))

    def decode(self, ids: list[int]) -> str:
        return str(self.words.decode(ids))

    def ready(self, question: Question) -> Ready:
        """Raises UserError, which says what is wrong with the question."""
        inputs = prepare_prompt(self.host, question.text, [picture(question)])
        end = getattr(self.words, "eos_token_id", None)
        ends = [end] if end in self.ends else sorted(self.ends)[:1]
        right = [*self.encode(question.answers[0]), *ends]
        if not right:
            raise UserError("its answer is empty, and the tokenizer has no token that ends one")
        return Ready(inputs, right)

    def begin(self, asked: Sequence[Ready]) -> Batch:
        views = []
        with generation_stream():
            for one in asked:
                views.append(self.host.encode_images(one.inputs, self.want))
                mx.eval([_arrays(view) for view in views[-1]])
        sizes = [sum(view.signals.x_BND.shape[1] for view in own) for own in views]
        return Batch(asked, views, sizes)

    def answer(self, batch: Batch, pipeline: Pipeline, keep: float, max_tokens: int) -> Answers:
        """With `keep` tokens of an image, all where it has fewer, or with that share of them.

        Raises UserError where that cannot be.
        """
        policy = check_pipeline(self.host, pipeline, None)
        answers = []
        for one, seen, N in zip(batch.asked, batch.views, batch.sizes, strict=True):
            share, K = (None, min(keep, N)) if isinstance(keep, int) else (keep, None)
            with self.host.preserve_state(), generation_stream():
                views = add_text(self.host, one.inputs, seen, pipeline)
                budgets = budgets_by_view(views, share, K, pipeline)
                prompt = prune_prompt(self.host, one.inputs, views, pipeline, budgets, policy)
                self.host.check_length(prompt.length)
                prompt = prefill_through_cuts(self.host, prompt, pipeline, budgets, policy)
                prefill = HostPrefill(self.host, prompt)
                answers.append(answers_of(prefill, np.array([one.right]), self.ends, max_tokens))
        ids = [answer for one in answers for answer in one.ids]
        return Answers(ids, np.concatenate([one.logprob_B for one in answers]))

    def _policy(self, pipeline: Pipeline) -> str | None:
        try:
            return check_pipeline(self.host, pipeline, None)
        except UserError:
            return None  # `answer` says why


def usual(host: Host) -> list[str]:
    """All methods that can prune this model."""
    able = []
    for name, method in METHODS.items():
        if method.stage is Stage.ENHANCER or method.learned or name == "none":
            continue
        try:
            check_pipeline(host, plan(name), None)
        except UserError:
            continue
        able.append(name)
    return able


def _arrays(view: View) -> Iterator[mx.array]:
    yield from (*view.signals.arrays.values(), *view.deepstack)
