"""Answers of our models whose tokens a twig drafts ahead, one question after another.

Speculative decoding is for one prompt at a time, so the questions of a batch are read one by one,
each with the twig. Pictures are encoded once for all methods, as without drafts. The answers are
those without: see `generation.speculation`.
"""

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..generation.speculation import Speculation, twig_of
from ..generation.steps import greedy, likelihood
from ..inputs.image import MAX_PIXELS
from ..inputs.processor import Processor
from ..models.vlm import VLM, Prefill
from ..pruners import Pipeline
from .answers import (
    Answers,
    DraftFigures,
    PreparedQuestion,
    QuestionBatch,
    kept_of_images,
    prepare_question,
    share_tower,
)
from .questions import Question


@dataclass(frozen=True)
class SeparateQuestions:
    """Questions of a batch, each with a model whose tower encodes its picture once."""

    questions: list[tuple[VLM, QuestionBatch]]
    sizes: list[int]  # visual tokens of each image


class DraftingVLM:
    """One of our models as an EvaluatedModel, with up to `num_draft_tokens` drafted at once.

    Raises UserError where the model has no twig beside it.
    """

    questions_at_once = 1  # they are answered one by one

    def __init__(
        self, model: VLM, processor: Processor, pipelines: Sequence[Pipeline],
        num_draft_tokens: int, max_pixels: int = MAX_PIXELS,
    ):  # fmt: skip
        self.max_pixels = max_pixels
        twig_of(model, processor.name)
        self.model, self.processor, self.pipelines = model, processor, pipelines
        self.encode, self.decode = processor.tokenizer.encode, processor.tokenizer.decode
        self.ends, self.num_draft_tokens = processor.tokenizer.eos_token_ids, num_draft_tokens

    def prepare(self, question: Question) -> PreparedQuestion:
        return prepare_question(self.model, self.processor, question, self.max_pixels)

    def make_batch(self, prepared: Sequence[PreparedQuestion]) -> SeparateQuestions:
        questions = []
        for question in prepared:
            model, tower = share_tower(self.model, self.pipelines)
            batch = QuestionBatch(model, [question])
            tower.start(batch)
            questions.append((model, batch))
        sizes = [size for _, batch in questions for size in batch.sizes]
        return SeparateQuestions(questions, sizes)

    def answer(
        self, batch: SeparateQuestions, pipeline: Pipeline, K: float, max_tokens: int
    ) -> Answers:
        """The answers with K of N visual tokens, and what was drafted. Raises UserError."""
        ids, logprobs, figures, kept = [], [], DraftFigures(), list[int]()
        for model, question in batch.questions:
            twig = twig_of(self.model, self.processor.name)
            prefill = model(question.prompts, question.pixels_IHW3, pipeline, int(K), twig=twig)
            logprobs.append(likelihood(prefill, question.right_BA))
            kept += kept_of_images(prefill, pipeline)
            speculation = Speculation(prefill, twig, self.ends, self.num_draft_tokens)
            answer, drafted = draft_answer(speculation, prefill, self.ends, max_tokens)
            ids.append(answer)
            figures += drafted
        return Answers(ids, np.concatenate(logprobs), figures, tuple(kept))


def draft_answer(
    speculation: Speculation, prefill: Prefill, ends: Collection[int], max_tokens: int
) -> tuple[list[int], DraftFigures]:
    """A greedy answer without the token that ended it, and how it was drafted.

    The time is that of the tokens after the first, which the prompt gave.
    """
    first = int(np.array(greedy(prefill.logits_BV))[0, 0])
    ids, figures, start = [], DraftFigures(), time.perf_counter()
    for n, token in enumerate(speculation.tokens(first, max_tokens)):
        figures = DraftFigures(token.drafted or 0, token.accepted or 0, n)
        if token.id in ends:
            break
        ids.append(token.id)
    return ids, replace(figures, seconds=time.perf_counter() - start)
