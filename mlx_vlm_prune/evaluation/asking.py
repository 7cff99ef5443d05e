"""Every question to every method: a batch at a time, each kept before the next begins.

Shapes: Q questions, P methods with their budgets, B questions of a batch.
"""

import hashlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from ..checkpoints.errors import UserError
from ..pruners import Pipeline, plan
from ..pruners.budget import tokens_for
from .answers import Answers
from .judge import Sheet, check_kinds
from .kept import Answered, Kept
from .questions import Bad, Format, Question


@dataclass(frozen=True)
class QuestionSet:
    """Questions to be read as often as they are needed, by the rules of their format."""

    name: str
    format: Format
    source: Callable[[Bad], Iterator[Question]]
    limit: int | None = None
    skip: bool = False

    def read(self, bad: Bad) -> Iterator[Question]:
        """The questions, up to the limit; a group that was begun is completed."""
        last = ""
        for n, question in enumerate(self.source(bad)):
            goes_on = question.group and question.group == last
            if self.limit is not None and n >= self.limit and not goes_on:
                return
            last = question.group
            yield question

    def listed(self) -> tuple[list[Question], list[str]]:
        """All questions, and what was left out. Of images in memory only a digest is held."""
        bad = Bad(self.skip)
        bar = tqdm(self.read(bad), desc="reading questions", file=sys.stderr, delay=2, leave=False)
        found = [_light(question) for question in bar]
        if not found:
            raise UserError(f"{self.name} holds no question")
        check_kinds(question.kind for question in found)
        return found, bad.found


def _light(question: Question) -> Question:
    if isinstance(question.image, bytes):
        return replace(question, image=hashlib.sha256(question.image).digest())
    return question


def fingerprint(questions: Iterable[Question]) -> str:
    """Of all that is asked, and of the images as far as they are told apart without opening."""
    told = hashlib.sha256()
    for q in questions:
        image: object = q.image if isinstance(q.image, bytes) else ""
        if isinstance(q.image, Path) and q.image.exists():
            about = q.image.stat()
            image = (q.image.name, about.st_size, about.st_mtime_ns)
        told.update(repr((q.id, q.text, q.answers, q.kind, q.group, q.told, image)).encode())
    return told.hexdigest()


class Asked(Protocol):
    """A model that questions are put to: ours, or one of mlx-vlm's."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...

    def ready(self, question: Question) -> Any:
        """The question as the model reads it. Raises UserError, which says what is wrong."""

    def begin(self, asked: Sequence[Any]) -> Any:
        """A batch of those, and the `sizes` of their images in visual tokens."""

    def answer(self, batch: Any, pipeline: Pipeline, keep: float, max_tokens: int) -> Answers:
        """What the model says to a batch. Raises UserError where that cannot be."""


@dataclass(frozen=True)
class Entry:
    """A method with its budget: one row of the result."""

    spec: str
    K: float  # tokens; below 1, or 1.0, a share of an image's
    pipeline: Pipeline

    def tokens(self, sizes: Sequence[int]) -> int:
        """That an image keeps, on average over images of so many."""
        if isinstance(self.K, int):
            return round(sum(min(self.K, N) for N in sizes) / len(sizes))
        return round(sum(tokens_for(N, self.K) for N in sizes) / len(sizes))


def entries(
    N: int | None, specs: Sequence[str], budgets: Sequence[float], learned: Mapping[str, Any]
) -> tuple[list[Entry], list[dict]]:
    """Full, then at every budget `random` and the others; and what cannot be, with the reason.

    `N` is that of every image; where they differ, None. Raises UserError for a method that there
    is not.
    """
    found, refused = [Entry("none", N or 1.0, plan("none"))], []
    for K in budgets:
        for spec in dict.fromkeys(["random", *specs]):
            pipeline = plan(spec, learned)
            if pipeline.trained_tokens not in (None, K) and N != K:
                why = f"it was trained for {pipeline.trained_tokens} tokens"
                refused.append({"pruner": spec, "tokens": K, "why": why})
            elif spec != "none":
                found.append(Entry(spec, K, pipeline))
    return found, refused


class Asking:
    """Asks all questions of all entries, the first of which is full."""

    def __init__(
        self, model: Asked, questions: QuestionSet, listed: list[Question],
        contest: Sequence[Entry], max_tokens: int, size: int,
    ):  # fmt: skip
        self.model, self.questions, self.listed = model, questions, listed
        self.contest, self.max_tokens, self.size = contest, max_tokens, size
        self.refused: dict[int, str] = {}
        self.done: list[Answered] = []
        self.answering: list[list[int]] = []  # of each batch, the entries that said something
        self.right, self.count = [0.0] * len(contest), 0
        self.tick: Callable[[int], object] = lambda answers: None

    @property
    def upto(self) -> int:
        """Questions that are done with."""
        return self.done[-1].upto if self.done else 0

    def run(self, kept: Kept) -> None:
        """Go on after what was kept, to the end."""
        for batch in kept.read():
            self._book(batch)
        if self.done:
            print(f"going on after {self.upto} of {len(self.listed)} questions", file=sys.stderr)
        total = len(self.listed) * len(self.contest)
        begun = self.upto * len(self.contest)
        with tqdm(total=total, initial=begun, desc="answers", file=sys.stderr) as bar:
            self.tick = bar.update
            for upto, asked, made, skipped in self._batches(self.upto):
                batch = self._answered(upto, asked, made, skipped)
                kept.add(batch)
                self._book(batch)
                bar.set_postfix_str(self.standing(), refresh=False)
                bar.update(upto * len(self.contest) - bar.n)

    def _batches(self, start: int) -> Iterator[tuple[int, list[int], list[Any], list[str]]]:
        """Numbers and questions made ready, with what was left out before them."""
        asked, made, bad = [], [], Bad(self.questions.skip)
        again = self.questions.read(Bad(skip=True))  # what was left out of the file is known
        for n, question in enumerate(islice(again, start, len(self.listed)), start):
            try:
                made.append(self.model.ready(question))
                asked.append(n)
            except UserError as e:
                bad(f"question {question.id}", str(e))
            if len(asked) == self.size:
                yield n + 1, asked, made, bad.found
                asked, made, bad = [], [], Bad(self.questions.skip)
        if asked or bad.found:
            yield len(self.listed), asked, made, bad.found

    def _answered(
        self, upto: int, asked: list[int], made: list[Any], skipped: list[str]
    ) -> Answered:
        began, decode = time.perf_counter(), self.model.decode
        who = " to ".join(str(self.listed[n].id) for n in dict.fromkeys(asked[:1] + asked[-1:]))
        batch = self.model.begin(made) if made else None
        found, refused = self._all(batch, who) if batch else ([], [])
        full = found[0].ids if found else []
        return Answered(
            upto, asked,
            said=[[decode(ids) for ids in said.ids] for said in found],
            logprob=[said.logprob_B.tolist() for said in found],
            loyal=[[a == b for a, b in zip(said.ids, full, strict=True)] for said in found],
            seconds=time.perf_counter() - began, sizes=batch.sizes if batch else [],
            skipped=skipped, refused=refused,
        )  # fmt: skip

    def _all(self, batch: Any, who: str) -> tuple[list[Answers], list[tuple[int, str]]]:
        """What every entry says. One that cannot is asked no more, and has no row."""
        found, refused = [], []
        for p, entry in enumerate(self.contest):
            if p not in self.refused:
                ask = (batch, entry.pipeline, entry.K, self.max_tokens)
                try:
                    found.append(self.model.answer(*ask))
                except UserError as e:
                    if p == 0:
                        raise UserError(f"question {who}, with all visual tokens: {e}") from e
                    refused.append((p, f"question {who}: {e}" if self.count else str(e)))
            self.tick(len(batch.sizes))
        return found, refused

    def _book(self, batch: Answered) -> None:
        self.done.append(batch)
        self.refused |= {p: why for p, why in batch.refused}
        able = [p for p in range(len(self.contest)) if p not in self.refused]
        self.answering.append(able)
        asked = [self.listed[n] for n in batch.asked]
        for p, said in zip(able, batch.said, strict=bool(asked)):
            pairs = zip(asked, said, strict=True)
            self.right[p] += sum(self.questions.format.score(q, text) for q, text in pairs)
        self.count += len(asked)

    def standing(self) -> str:
        """Full, the best and the worst so far, question by question."""
        if not self.count:
            return ""
        able = [p for p in range(1, len(self.contest)) if p not in self.refused]
        order = sorted(able, key=lambda p: -self.right[p])
        told = {"full": 0} | ({"best": order[0], "worst": order[-1]} if order else {})
        shown = []
        for name, p in told.items():
            entry = self.contest[p]
            who = "" if p == 0 else f" {entry.spec}@{entry.K:.4g}"
            shown.append(f"{name}{who} {self.right[p] / self.count:.1%}")
        return ", ".join(shown)

    @property
    def sizes(self) -> list[int]:
        """Visual tokens of each question's image."""
        return [N for batch in self.done for N in batch.sizes]

    @property
    def able(self) -> list[Entry]:
        """The entries that could be asked, full first."""
        return [entry for p, entry in enumerate(self.contest) if p not in self.refused]

    def refusals(self) -> list[dict[str, Any]]:
        """What could not be asked, and why."""
        named = [(self.contest[p], why) for p, why in self.refused.items()]
        return [{"pruner": one.spec, "tokens": one.K, "why": why} for one, why in named]

    def sheet(self) -> tuple[Sheet, list[str]]:
        """All answers, and what was left out: with a question the rest of its group."""
        numbers = [n for batch in self.done for n in batch.asked]
        missing = sorted(set(range(len(self.listed))) - set(numbers))
        lost = dict.fromkeys((q.kind, q.group) for n in missing if (q := self.listed[n]).group)
        questions = [self.listed[n] for n in numbers]
        use = [i for i, q in enumerate(questions) if (q.kind, q.group) not in lost]
        if not use:
            raise UserError(f"no question of {self.questions.name} could be asked")
        texts_PQ, loyal_PQ, logprob_PQ = (self._rows(of) for of in ("said", "loyal", "logprob"))
        sheet = Sheet(
            [questions[i] for i in use], [[texts[i] for i in use] for texts in texts_PQ],
            np.array(loyal_PQ)[:, use], np.array(logprob_PQ)[:, use],
        )  # fmt: skip
        left_out = [what for batch in self.done for what in batch.skipped]
        groups = [f"group {group}: a question of it is missing" for _, group in lost]
        return sheet, left_out + groups

    def _rows(self, name: str) -> list[list[Any]]:
        """One of the batches' figures (P, Q), of the entries that could be asked to the end."""
        rows: list[list[Any]] = [[] for _ in self.able]
        for batch, able in zip(self.done, self.answering, strict=True):
            each = zip(able, getattr(batch, name), strict=bool(batch.asked))
            last = [values for p, values in each if p not in self.refused]
            for row, values in zip(rows, last, strict=False):
                row += values
        return rows
