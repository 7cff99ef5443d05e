"""The evaluation loop: every question to every method, a batch at a time, each batch saved.

Shapes: Q questions, P methods with their budgets, B questions of a batch.
"""

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, field, replace
from itertools import islice
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from ..checkpoints.errors import UserError
from ..machine.processes import ProcessGroup
from ..pruners import Pipeline
from .answers import Answers, DraftFigures
from .budgeted_methods import BudgetedMethod
from .judge import AnswerTable
from .question_set import QuestionSet
from .questions import BadRecords, Question
from .resume import AnsweredBatch, ResumeFile

logger = logging.getLogger("mlx_vlm_prune")


class EvaluatedModel(Protocol):
    """A model under evaluation: one of ours, or one of mlx-vlm's."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...

    def prepare(self, question: Question) -> Any:
        """A question as the model reads it. Raises UserError where it cannot be asked."""

    def make_batch(self, prepared: Sequence[Any]) -> Any:
        """A batch of prepared questions, with the `sizes` of their images in visual tokens."""

    def answer(self, batch: Any, pipeline: Pipeline, K: float, max_tokens: int) -> Answers:
        """The answers to a batch, with K tokens or a share of them. Raises UserError."""


@dataclass
class PreparedBatch:
    """Prepared questions with their numbers, and messages on the questions skipped before them."""

    questions_done: int = 0  # questions of the set that are done after this batch
    numbers: list[int] = field(default_factory=list)
    prepared: list[Any] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


@dataclass
class MethodAnswers:
    """One method's answers to all questions so far."""

    responses: list[str] = field(default_factory=list)
    loyal: list[bool] = field(default_factory=list)  # the same ids as with all tokens
    logprobs: list[float] = field(default_factory=list)  # of the right answers
    score: float = 0.0  # the sum over the questions
    drafts: DraftFigures = field(default_factory=DraftFigures)  # the same


class EvaluationRun:
    """Puts all questions to all methods, the first of which is full (no pruning).

    A method that fails on a question is not asked again, and has no row in the result. Several
    processes answer a batch each at the same time, and all record all of them; the first saves.
    """

    def __init__(
        self, model: EvaluatedModel, question_set: QuestionSet, questions: list[Question],
        methods: Sequence[BudgetedMethod], max_tokens: int, batch_size: int,
        processes: ProcessGroup,
    ):  # fmt: skip
        self.processes = processes
        self.model, self.question_set, self.questions = model, question_set, questions
        self.methods, self.max_tokens, self.batch_size = methods, max_tokens, batch_size
        self.is_scored = question_set.format.is_scored(questions)
        self.failures: dict[int, str] = {}  # from a method's number to the reason
        self.batches: list[AnsweredBatch] = []
        self.answers = [MethodAnswers() for _ in methods]
        self.advance_bar: Callable[[int], object] = lambda answers: None

    @property
    def done(self) -> int:
        """How many questions are answered or skipped."""
        return self.batches[-1].questions_done if self.batches else 0

    @property
    def answered(self) -> int:
        """How many questions are answered."""
        return sum(len(batch.numbers) for batch in self.batches)

    @property
    def sizes(self) -> list[int]:
        """The visual tokens of each answered question's images."""
        return [N for batch in self.batches for N in batch.sizes]

    @property
    def working(self) -> list[int]:
        """The numbers of the methods that have not failed, full first."""
        return [p for p in range(len(self.methods)) if p not in self.failures]

    @property
    def working_methods(self) -> list[BudgetedMethod]:
        return [self.methods[p] for p in self.working]

    def run(self, resume_file: ResumeFile[AnsweredBatch]) -> None:
        """Read the batches saved before, then answer the rest and save each batch."""
        is_first = self.processes.is_first
        saved = [asdict(batch) for batch in resume_file.read()] if is_first else []
        for batch in json.loads(self.processes.gather(json.dumps(saved))[0]):
            self._record(AnsweredBatch(**batch))
        if self.batches and is_first:
            logger.info("going on after %d of %d questions", self.done, len(self.questions))
        total = len(self.questions) * len(self.methods)
        initial = self.done * len(self.methods)
        with tqdm(
            total=total, initial=initial, desc="answers", file=sys.stderr, disable=not is_first
        ) as bar:
            self.advance_bar = bar.update
            batches = self._prepared_batches(self.done)
            while at_once := list(islice(batches, self.processes.size)):
                for batch in self._answer_all(at_once):
                    if is_first:
                        resume_file.append(batch)
                    self._record(batch)
                bar.set_postfix_str(self.scores_so_far(), refresh=False)
                bar.update(self.done * len(self.methods) - bar.n)

    def _answer_all(self, at_once: Sequence[PreparedBatch]) -> Iterator[AnsweredBatch]:
        """The answers to a batch for each process; each is recorded before the next is yielded."""
        if self.processes.size == 1:
            yield self._answer(at_once[0])
            return
        working, rank, text, fault = self.working, self.processes.rank, "", None
        try:
            if rank < len(at_once):
                text = json.dumps(asdict(self._answer(at_once[rank])))
        except UserError as e:
            fault = e
        self.processes.agree(fault)
        for gathered in filter(None, self.processes.gather(text)):
            batch = AnsweredBatch(**json.loads(gathered))
            refused = dict(batch.refused)
            answered = [p for p in working if p not in refused] if batch.numbers else []
            # A method that failed in a batch before this one has no row from there on.
            kept = [i for i, p in enumerate(answered) if p not in self.failures]
            yield replace(
                batch, responses=[batch.responses[i] for i in kept],
                logprob=[batch.logprob[i] for i in kept], loyal=[batch.loyal[i] for i in kept],
                drafts=[batch.drafts[i] for i in kept if batch.drafts],
            )  # fmt: skip

    def _prepared_batches(self, start: int) -> Iterator[PreparedBatch]:
        """The questions from number `start` on, in batches."""
        batch, bad = PreparedBatch(), BadRecords(self.question_set.skip_bad)
        reread = self.question_set.read(BadRecords(skip=True))  # bad records were reported before
        for n, question in enumerate(islice(reread, start, len(self.questions)), start):
            try:
                batch.prepared.append(self.model.prepare(question))
                batch.numbers.append(n)
            except UserError as e:
                bad.report(f"question {question.id}", str(e))
            if len(batch.numbers) == self.batch_size:
                batch.questions_done, batch.skipped = n + 1, bad.messages
                yield batch
                batch, bad = PreparedBatch(), BadRecords(self.question_set.skip_bad)
        if batch.numbers or bad.messages:
            batch.questions_done, batch.skipped = len(self.questions), bad.messages
            yield batch

    def _answer(self, batch: PreparedBatch) -> AnsweredBatch:
        """The answers of all working methods to a batch."""
        start, decode = time.perf_counter(), self.model.decode
        answers: list[Answers] = []
        failures: list[tuple[int, str]] = []
        sizes: list[int] = []
        if batch.prepared:
            model_batch = self.model.make_batch(batch.prepared)
            answers, failures = self._answer_by_methods(model_batch, batch.numbers)
            sizes = model_batch.sizes
        full = answers[0].ids if answers else []
        return AnsweredBatch(
            batch.questions_done, batch.numbers,
            responses=[[decode(ids) for ids in method.ids] for method in answers],
            logprob=[method.logprob_B.tolist() for method in answers],
            loyal=[[a == b for a, b in zip(method.ids, full, strict=True)] for method in answers],
            seconds=time.perf_counter() - start, sizes=sizes, skipped=batch.skipped,
            refused=failures, drafts=[[*astuple(m.drafts)] for m in answers if m.drafts],
        )  # fmt: skip

    def _answer_by_methods(
        self, model_batch: Any, numbers: list[int]
    ) -> tuple[list[Answers], list[tuple[int, str]]]:
        """The answers of each working method, and the methods that fail, with the reason."""
        names = " to ".join(self.questions[n].id for n in dict.fromkeys(numbers[:1] + numbers[-1:]))
        answers, failures = [], []
        for p, method in enumerate(self.methods):
            if p not in self.failures:
                try:
                    answers.append(
                        self.model.answer(model_batch, method.pipeline, method.K, self.max_tokens)
                    )
                except UserError as e:
                    if p == 0:
                        raise UserError(f"question {names}, with all visual tokens: {e}") from e
                    failures.append((p, f"question {names}: {e}" if self.answered else str(e)))
            self.advance_bar(len(numbers))
        return answers, failures

    def _record(self, batch: AnsweredBatch) -> None:
        """Append a batch to the answers of every method."""
        self.batches.append(batch)
        self.failures |= dict(batch.refused)
        if not batch.numbers:
            return
        questions, score = (
            [self.questions[n] for n in batch.numbers],
            self.question_set.format.score,
        )
        for p, drafts in zip(self.working, batch.drafts, strict=False):  # none without a twig
            self.answers[p].drafts += DraftFigures(*drafts)
        rows = zip(self.working, batch.responses, batch.loyal, batch.logprob, strict=True)
        for p, responses, loyal, logprobs in rows:
            answers = self.answers[p]
            answers.responses += responses
            answers.loyal += loyal
            answers.logprobs += logprobs
            if self.is_scored:
                answers.score += sum(
                    score(q, text) for q, text in zip(questions, responses, strict=True)
                )

    def scores_so_far(self) -> str:
        """The mean scores of full, the best and the worst method, for the progress bar."""
        count = self.answered
        if not count or not self.is_scored:
            return ""
        ranked = sorted(self.working[1:], key=lambda p: -self.answers[p].score)
        shown = [f"full {self.answers[0].score / count:.1%}"]
        for name, p in zip(("best", "worst"), (ranked[:1] + ranked[-1:]), strict=False):
            method = self.methods[p]
            mean = self.answers[p].score / count
            shown.append(f"{name} {method.spec}@{method.K:.4g} {mean:.1%}")
        return ", ".join(shown)

    def refusals(self) -> list[dict[str, Any]]:
        """The methods that failed, and why."""
        failed = [
            (self.methods[p].spec, self.methods[p].K, why) for p, why in self.failures.items()
        ]
        return [{"pruner": spec, "tokens": K, "why": why} for spec, K, why in dict.fromkeys(failed)]

    def collect(self) -> tuple[AnswerTable, list[str]]:
        """The working methods' answers, and messages on what was left out.

        Where a question of a group is missing, the whole group is left out.
        """
        numbers = [n for batch in self.batches for n in batch.numbers]
        questions = [self.questions[n] for n in numbers]
        missing = [self.questions[n] for n in sorted(set(range(len(self.questions))) - {*numbers})]
        incomplete = dict.fromkeys((q.kind, q.group) for q in missing if q.group)
        usable = [i for i, q in enumerate(questions) if (q.kind, q.group) not in incomplete]
        if not usable:
            raise UserError(f"no question of {self.question_set.name} could be asked")
        answers = [self.answers[p] for p in self.working]
        table = AnswerTable(
            self.question_set.format.prepare_scoring([questions[i] for i in usable]),
            [[method.responses[i] for i in usable] for method in answers],
            np.array([method.loyal for method in answers])[:, usable],
            np.array([method.logprobs for method in answers])[:, usable],
        )
        skipped = [message for batch in self.batches for message in batch.skipped]
        groups = [f"group {group}: a question of it is missing" for _, group in incomplete]
        return table, skipped + groups
