"""The evaluation loop: every question to every method, a batch at a time, each answer saved.

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

    questions_at_once: int  # of a batch, if nothing else is said

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
    kept: list[int] = field(default_factory=list)  # of each image, where they have own budgets


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
        self.lines: list[AnsweredBatch] = []
        self.done = 0  # questions that all methods have answered, or that were skipped
        self.waiting: list[int] = []  # methods that have yet to answer the batch in hand
        self.full_line: AnsweredBatch | None = None  # of the latest batch
        self.answers = [MethodAnswers() for _ in methods]
        self.advance_bar: Callable[[int], object] = lambda answers: None

    @property
    def full_lines(self) -> list[AnsweredBatch]:
        """A line of each batch: full's answers."""
        return [line for line in self.lines if line.method == 0]

    @property
    def answered(self) -> int:
        """How many questions full has answered."""
        return sum(len(line.numbers) for line in self.full_lines)

    @property
    def sizes(self) -> list[int]:
        """The visual tokens of each answered question's images."""
        return [N for line in self.full_lines for N in line.sizes]

    @property
    def working(self) -> list[int]:
        """The numbers of the methods that have not failed, full first."""
        return [p for p in range(len(self.methods)) if p not in self.failures]

    @property
    def working_methods(self) -> list[BudgetedMethod]:
        return [self.methods[p] for p in self.working]

    @property
    def progress(self) -> str:
        """How many answers of all are there."""
        answers = sum(len(line.ids) for line in self.lines)
        return f"{answers:,} of {len(self.questions) * len(self.methods):,} answers"

    def run(self, resume_file: ResumeFile[AnsweredBatch]) -> None:
        """Read the answers saved before, then ask for the rest and save each method's answers."""
        is_first = self.processes.is_first
        saved = resume_file.read(self._take_over) if is_first else []
        if self.processes.size > 1:
            lines = json.dumps([asdict(line) for line in saved])
            for fields in json.loads(self.processes.gather(lines)[0]):
                if not is_first:
                    self._record(AnsweredBatch(**fields))
        if self.lines and is_first:
            logger.info("going on after %s", self.progress)
        P, in_hand = len(self.methods), self.full_line.numbers if self.full_line else []
        initial = self.done * P + (P - len(self.waiting)) * len(in_hand) * bool(self.waiting)
        total = len(self.questions) * P
        with tqdm(
            total=total, initial=initial, desc="answers", file=sys.stderr, disable=not is_first
        ) as bar:
            self.advance_bar = bar.update
            batches = self._prepared_batches(self.done)
            while at_once := list(islice(batches, self.processes.size)):
                for line in self._answer_all(at_once):
                    if is_first:
                        resume_file.append(line)
                    self._record(line)
                bar.set_postfix_str(self.scores_so_far(), refresh=False)
                bar.update(self.done * P - bar.n)
        self._check_counts()

    def _take_over(self, line: AnsweredBatch) -> bool:
        """Record a saved line, if it goes on where the lines before it end."""
        if self.waiting and self.full_line:
            full = self.full_line
            is_next = line.method == self.waiting[0] and line.is_whole
            is_next &= (line.questions_done, line.numbers) == (full.questions_done, full.numbers)
        else:
            span = range(self.done, line.questions_done)
            is_next = line.method == 0 and not line.refused and line.is_whole
            is_next &= 0 < len(span) == len(line.numbers) + len(line.skipped)
            is_next &= line.questions_done <= len(self.questions)
            is_next &= [n for n in span if n in {*line.numbers}] == line.numbers
        if is_next:
            self._record(line)
        return is_next

    def _answer_all(self, at_once: Sequence[PreparedBatch]) -> Iterator[AnsweredBatch]:
        """The lines of a batch for each process; each is recorded before the next is yielded."""
        rank, begun = self.processes.rank, self.waiting
        if begun and self.full_line and at_once[0].numbers != self.full_line.numbers:
            raise UserError("questions that could be read before cannot be read any more")
        methods = [begun or self.working, *[self.working] * (len(at_once) - 1)]
        if self.processes.size == 1:
            yield from self._answer(at_once[0], methods[0])
            return
        texts, fault = [], None
        try:
            if rank < len(at_once):
                texts = [asdict(line) for line in self._answer(at_once[rank], methods[rank])]
        except UserError as e:
            fault = e
        self.processes.agree(fault)
        for gathered in self.processes.gather(json.dumps(texts)):
            for fields in json.loads(gathered):
                line = AnsweredBatch(**fields)
                # A method that failed in a batch before this one has no line from there on.
                if line.method not in self.failures:
                    yield line

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

    def _answer(self, batch: PreparedBatch, methods: Sequence[int]) -> Iterator[AnsweredBatch]:
        """The answers of each of these methods to a batch."""
        if not batch.prepared:
            yield AnsweredBatch(batch.questions_done, 0, [], [], [], 0.0, skipped=batch.skipped)
            return
        start = time.perf_counter()
        model_batch = self.model.make_batch(batch.prepared)
        for p in [*methods]:
            line = self._answer_by(p, model_batch, batch.numbers)
            seconds, start = time.perf_counter() - start, time.perf_counter()
            line = replace(line, questions_done=batch.questions_done, seconds=seconds)
            if p == 0:
                line = replace(line, sizes=model_batch.sizes, skipped=batch.skipped)
            yield line
            self.advance_bar(len(batch.numbers))

    def _answer_by(self, p: int, model_batch: Any, numbers: list[int]) -> AnsweredBatch:
        """The answers of one method, or the reason why it fails."""
        method = self.methods[p]
        try:
            answers = self.model.answer(model_batch, method.pipeline, method.K, self.max_tokens)
        except UserError as e:
            names = " to ".join(
                self.questions[n].id for n in dict.fromkeys(numbers[:1] + numbers[-1:])
            )
            if p == 0:
                raise UserError(f"question {names}, with all visual tokens: {e}") from e
            why = f"question {names}: {e}" if self.done else str(e)
            return AnsweredBatch(0, p, numbers, [], [], 0.0, refused=why)
        drafts = [*astuple(answers.drafts)] if answers.drafts else []
        logprob = answers.logprob_B.tolist()
        kept = [*answers.kept]
        return AnsweredBatch(0, p, numbers, answers.ids, logprob, 0.0, drafts=drafts, kept=kept)

    def _record(self, line: AnsweredBatch) -> None:
        """Append a line to the answers of its method."""
        self.lines.append(line)
        if line.method == 0:
            self.full_line = line
            self.waiting = [p for p in self.working if p] if line.numbers else []
        else:
            self.waiting = [p for p in self.waiting if p != line.method]
        if line.refused:
            self.failures[line.method] = line.refused
        else:
            self._add_answers(line)
        if not self.waiting:
            self.done = line.questions_done

    def _add_answers(self, line: AnsweredBatch) -> None:
        answers, full, decode = self.answers[line.method], self.full_line, self.model.decode
        responses = [decode(ids) for ids in line.ids]
        answers.responses += responses
        answers.loyal += [a == b for a, b in zip(line.ids, full.ids if full else [], strict=True)]
        answers.logprobs += line.logprob
        answers.kept += line.kept
        if line.drafts:  # none without a twig
            answers.drafts += DraftFigures(*line.drafts)
        if self.is_scored:
            score, questions = self.question_set.format.score, self.questions
            pairs = zip(line.numbers, responses, strict=True)
            answers.score += sum(score(questions[n], text) for n, text in pairs)

    def _check_counts(self) -> None:
        """Raises UserError where some question is not answered once by each working method."""
        numbers = [n for line in self.full_lines for n in line.numbers]
        skipped = sum(len(line.skipped) for line in self.full_lines)
        counts = {len(self.answers[p].responses) for p in self.working}
        is_once = len({*numbers}) == len(numbers) == len(self.questions) - skipped
        if not is_once or counts != {len(numbers)}:
            raise UserError(
                f"{len(numbers)} answers were kept to {len(self.questions)} questions; remove the"
                " .part.jsonl file beside the result, and ask again"
            )

    def scores_so_far(self) -> str:
        """The mean scores of full, the best and the worst method, for the progress bar."""
        count = len(self.answers[0].responses)
        if not count or not self.is_scored:
            return ""
        ranked = sorted(self.working[1:], key=lambda p: -self.answers[p].score)
        shown = [f"full {self.answers[0].score / count:.1%}"]
        ends = ranked[:1] + ranked[-1:]
        if len(ranked) > 1 and len({self.answers[p].score for p in ends}) == 1:
            return shown[0]  # a tie
        for name, p in zip(("best", "worst"), ends, strict=False):
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
        numbers = [n for line in self.full_lines for n in line.numbers]
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
        skipped = [message for line in self.full_lines for message in line.skipped]
        groups = [f"group {group}: a question of it is missing" for _, group in incomplete]
        return table, skipped + groups
