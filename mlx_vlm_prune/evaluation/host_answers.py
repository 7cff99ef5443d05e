"""Answers of mlx-vlm's models to a batch of questions. The tower runs once for all methods.

Shapes: B questions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import mlx.core as mx
import numpy as np

from ..checkpoints.errors import UserError
from ..generation.request import Request
from ..hosts.clips import prepare_clip, why_not_clip
from ..hosts.compatibility import check_pipeline
from ..hosts.families.pruner_defaults import with_family_defaults
from ..hosts.host import Host, generation_stream
from ..hosts.prefill import HostPrefill, prefill_through_cuts
from ..hosts.prepared_inputs import PreparedInputs, ProcessorOptions
from ..hosts.prompt import (
    ViewBudgets,
    add_text,
    budgets_by_view,
    encode_images,
    prepare_prompt,
    prune_prompt,
    signal_layers,
)
from ..hosts.views import View
from ..inputs.image import MAX_PIXELS
from ..inputs.video import open_video
from ..pruners import METHODS, Pipeline, Stage, plan
from .answers import Answers, answer_prefill, open_question_images
from .budgeted_methods import with_restore
from .questions import ClipFile, Question


@dataclass(frozen=True)
class PreparedHostQuestion:
    """A question as the model reads it, and the right answer's ids with its end."""

    inputs: PreparedInputs
    right_ids: list[int]


@dataclass(frozen=True)
class HostQuestionBatch:
    """Prepared questions, and the tower's output for each one's picture."""

    questions: Sequence[PreparedHostQuestion]
    views: list[list[View]]  # of each question
    sizes: list[int]  # visual tokens of each image


class EvaluatedHost:
    """A model of mlx-vlm's as an EvaluatedModel, for all these methods."""

    questions_at_once = 1  # they are answered one by one

    def __init__(self, host: Host, pipelines: Sequence[Pipeline], max_pixels: int = MAX_PIXELS):
        self.host, self.max_pixels = host, max_pixels
        self.tokenizer = getattr(host.processor, "tokenizer", host.processor)
        self.ends = set(self.tokenizer.stopping_criteria.eos_token_ids)
        self.want: dict[str, int | None] = {}
        for pipeline in pipelines:
            pipeline = with_family_defaults(pipeline, host.kind, host.processor)
            if self._is_supported(pipeline) and not pipeline.at(Stage.ENCODER):
                self.want |= signal_layers(host, pipeline)

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids))

    def prepare(self, question: Question) -> PreparedHostQuestion:
        """Open the images or the clip and build the prompt. Raises UserError where it cannot be
        asked."""
        inputs = self._inputs(question)
        end = getattr(self.tokenizer, "eos_token_id", None)
        ends = [end] if end in self.ends else sorted(self.ends)[:1]
        right_ids = [*self.encode(question.answers[0] if question.answers else ""), *ends]
        if not right_ids:
            raise UserError("its answer is empty, and the tokenizer has no token that ends one")
        return PreparedHostQuestion(inputs, right_ids)

    def _inputs(self, question: Question) -> PreparedInputs:
        """A question as ids and pixels. Raises UserError."""
        seen = question.image
        if not isinstance(seen, ClipFile):
            images = open_question_images(question, self.max_pixels)
            return prepare_prompt(self.host, question.text, images)
        clip = open_video(seen.path, seen.fps, seen.max_frames, self.max_pixels)
        return prepare_clip(self.host, Request(question.text, []), clip, ProcessorOptions())

    def make_batch(self, prepared: Sequence[PreparedHostQuestion]) -> HostQuestionBatch:
        views = []
        with generation_stream():
            for question in prepared:
                views.append(self.host.encode_images(question.inputs, self.want))
                mx.eval([_arrays(view) for view in views[-1]])
        sizes = [sum(map(_size, image)) for one in views for image in _by_image(one)]
        return HostQuestionBatch(prepared, views, sizes)

    def answer(
        self, batch: HostQuestionBatch, pipeline: Pipeline, K: float, max_tokens: int
    ) -> Answers:
        """The answers with K tokens of an image (an int), at most all, or a share (a float).

        Raises UserError where the method cannot prune this model or keep this budget.
        """
        pipeline = with_family_defaults(pipeline, self.host.kind, self.host.processor)
        policy = check_pipeline(self.host, pipeline, pipeline.policy)
        answers, by_view = [], partial(_budgets, K=K, pipeline=pipeline)
        for question, views in zip(batch.questions, batch.views, strict=True):
            with self.host.preserve_state(), generation_stream():
                views = self._views_for(pipeline, question.inputs, views, by_view)
                views = add_text(self.host, question.inputs, views, pipeline)
                budgets = by_view(views)
                prompt = prune_prompt(self.host, question.inputs, views, pipeline, budgets, policy)
                self.host.check_length(prompt.length)
                prompt = prefill_through_cuts(self.host, prompt, pipeline, budgets, policy)
                prefill, right_BA = HostPrefill(self.host, prompt), np.array([question.right_ids])
                answers.append(answer_prefill(prefill, right_BA, self.ends, max_tokens, pipeline))
        ids = [one.ids[0] for one in answers]
        kept = tuple(count for one in answers for count in one.kept)
        return Answers(ids, np.concatenate([one.logprob_B for one in answers]), kept=kept)

    def _views_for(
        self, pipeline: Pipeline, inputs: PreparedInputs, views: list[View], by_view: ViewBudgets
    ) -> list[View]:
        """These views, or others where methods work inside the tower, or read another layer for a
        signal in them."""
        want = signal_layers(self.host, pipeline)
        if want.items() <= self.want.items() and not pipeline.at(Stage.ENCODER):
            return views
        return encode_images(self.host, inputs, pipeline, by_view)

    def _is_supported(self, pipeline: Pipeline) -> bool:
        try:
            check_pipeline(self.host, pipeline, pipeline.policy)
        except UserError:  # which `answer` raises
            return False
        return True


def default_methods(host: Host, *, with_clips: bool = False) -> list[str]:
    """All methods that can prune this model (`with_clips`: clips, too), and selectors with
    `restore` where it can be."""

    def is_supported(spec: str) -> bool:
        pipeline = plan(spec, host.learned)
        try:
            check_pipeline(host, pipeline, None)
        except UserError:
            return False
        return not (with_clips and why_not_clip(host, pipeline))

    names = [
        name
        for name, method in METHODS.items()
        if method.stage is not Stage.ENHANCER
        and name != "none"
        and (not method.learned or name in host.learned)
    ]
    return [spec for spec in (*names, *with_restore(names)) if is_supported(spec)]


def _budgets(views: list[View], K: float, pipeline: Pipeline) -> list[int]:
    """Each view's number of tokens, where an image keeps K of them, at most all, or a share."""
    budgets: list[int] = []
    for image in _by_image(views):
        alone = [replace(view, image=0) for view in image]
        tokens = K if isinstance(K, int) else None
        budgets += budgets_by_view(alone, None if tokens else K, tokens, pipeline)
    return budgets


def _by_image(views: list[View]) -> list[list[View]]:
    """The views of each image, in order."""
    images = dict.fromkeys(view.image for view in views)
    return [[view for view in views if view.image == image] for image in images]


def _size(view: View) -> int:
    return view.N


def _arrays(view: View) -> Iterator[mx.array]:
    yield from (*view.signals.arrays.values(), *view.deepstack)
