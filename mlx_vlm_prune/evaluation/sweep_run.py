"""The loop of a sweep: rounds of answers about each image, full beside pruned, each round saved.

Every round has each case once, and before every `share` of them full. So the machine is as fast or
as slow for a pruned answer as for the full one that it is compared with.
"""

import logging
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tqdm import tqdm

from ..checkpoints.errors import UserError
from ..generation.result import GenerationResult
from ..machine.timing import take_turns
from .budgeted_methods import BudgetedMethod
from .resume import ResumeFile

logger = logging.getLogger("mlx_vlm_prune")
TITLE_LETTERS = 30  # of an image's name in the progress bar


@dataclass(frozen=True)
class Measurement:
    """One answer as it was measured. The field names are keys of the file to resume from.

    `ms` has the parts up to the first token, None where one was not timed alone, the `first_token`
    and the `total`, which ends with the answer. `layers` are the visual tokens that each layer of
    the language model held.
    """

    ms: dict[str, float | None]
    tokens_per_second: float | None  # None of an answer of one token
    text: str
    token_ids: list[int]
    prompt_tokens: int
    visual_tokens: int
    kept: int
    layers: list[int]
    cache_bytes: int
    peak_gb: float

    @classmethod
    def of(cls, answer: GenerationResult, total_ms: float) -> "Measurement":
        parts: dict[str, Any] = {**answer.ttft_ms}
        parts["first_token"] = parts.pop("total")
        runs = [[run["visual_tokens"]] * (run["last"] - run["first"] + 1) for run in answer.layers]
        return cls(
            {**parts, "total": total_ms}, answer.generation_tps or None, answer.text,
            answer.token_ids, answer.prompt_tokens, answer.visual_tokens,
            answer.visual_tokens_kept, [n for run in runs for n in run], answer.cache_bytes,
            answer.peak_memory,
        )  # fmt: skip

    @property
    def text_tokens(self) -> int:
        """Of a full answer: the rows of the prompt that are no visual tokens."""
        return self.prompt_tokens - self.visual_tokens

    def agreement(self, full: "Measurement") -> dict[str, float]:
        """Whether the answer is the `same` as full's, and their `overlap`: the tokens that both
        have, each as often as in both, as a share of the mean length."""
        lengths = len(self.token_ids) + len(full.token_ids)
        common = (Counter(self.token_ids) & Counter(full.token_ids)).total()
        overlap = 2 * common / lengths if lengths else 1.0
        return {"same": float(self.token_ids == full.token_ids), "overlap": overlap}


@dataclass(frozen=True)
class PrunedRun:
    """A case's answer, and the number of the full answer before it in its round."""

    case: int
    before: int
    measurement: Measurement


@dataclass(frozen=True)
class Round:
    """One round about an image. `refused` are the cases that failed, each with the reason.

    `number` counts the rounds about the image before it. `skipped` is the reason why the image
    cannot be asked about at all, if so.
    """

    image: int
    number: int
    full: list[Measurement] = field(default_factory=list)
    pruned: list[PrunedRun] = field(default_factory=list)
    refused: list[tuple[int, str]] = field(default_factory=list)
    skipped: str = ""

    @classmethod
    def of(
        cls, image: int, number: int, full: list[dict[str, Any]], pruned: list[dict[str, Any]],
        refused: list[tuple[int, str]], skipped: str,
    ) -> "Round":  # fmt: skip
        """From the fields as they were saved. Raises TypeError where some are missing."""
        runs = [PrunedRun(**run | {"measurement": Measurement(**run["measurement"])})
                for run in pruned]  # fmt: skip
        pairs = [(case, why) for case, why in refused]
        return cls(image, number, [Measurement(**one) for one in full], runs, pairs, skipped)


@dataclass(frozen=True)
class Rounds:
    """How many rounds are counted of each image, how many come before, and turns in each."""

    runs: int
    warmup: int
    share: int  # pruned answers after each full one

    def answers(self, cases: int) -> int:
        """Of one round."""
        return cases + math.ceil(cases / self.share)


class SweepRun:
    """Asks about every image in rounds of all cases.

    `answer` is `generate` but for the image and the budget. A case that fails on an image is not
    tried there again.
    """

    def __init__(
        self, answer: Callable[..., GenerationResult], images: Mapping[str, Any],
        full: BudgetedMethod, cases: Sequence[BudgetedMethod], plan: Rounds,
    ):  # fmt: skip
        self.answer, self.images, self.full, self.cases, self.plan = (
            answer, images, full, cases, plan
        )  # fmt: skip
        self.rounds: list[Round] = []
        self.failures: dict[tuple[int, int], str] = {}  # from image and case to the reason
        self.skipped: dict[int, str] = {}  # from image to the reason
        self.advance_bar: Callable[[int], object] = lambda answers: None

    def count(self, image: int) -> int:
        """How many rounds about an image are done."""
        return sum(line.image == image and not line.skipped for line in self.rounds)

    @property
    def progress(self) -> str:
        """How many rounds of all are done."""
        skipped = len(self.skipped) * self.plan.runs
        done = sum(min(self.plan.runs, self.count(image)) for image in range(len(self.images)))
        return f"{done + skipped} of {len(self.images) * self.plan.runs} rounds are measured"

    def run(self, resume_file: ResumeFile[Round]) -> None:
        """Take over the rounds saved before, then measure the rest and save each round."""
        resume_file.read(self._take_over)
        if self.rounds:
            logger.info("going on: %s", self.progress)
        left = {i: self._left(i) for i in range(len(self.images))}
        rounds = sum(n + self.plan.warmup for n in left.values() if n)
        total = rounds * self.plan.answers(len(self.cases))
        with tqdm(total=total, desc="answers", file=sys.stderr, unit="answer") as bar:
            self.advance_bar = bar.update
            for image, (name, _) in enumerate(self.images.items()):
                if left[image]:
                    bar.set_postfix_str(name[-TITLE_LETTERS:], refresh=False)
                    self._ask(image, left[image], resume_file)
            bar.total = bar.n  # fewer where cases were refused

    def _take_over(self, line: Round) -> bool:
        """Record a saved round, if it is the next one about its image."""
        is_next = (
            0 <= line.image < len(self.images)
            and line.image not in self.skipped
            and line.number == self.count(line.image)
            and bool(line.full or line.skipped)
            and all(
                0 <= run.case < len(self.cases) and 0 <= run.before < len(line.full)
                for run in line.pruned
            )
        )
        if is_next:
            self._record(line)
        return is_next

    def _left(self, image: int) -> int:
        return 0 if image in self.skipped else max(0, self.plan.runs - self.count(image))

    def _ask(self, image: int, runs: int, resume_file: ResumeFile[Round]) -> None:
        """The rounds about an image, or the reason why there are none."""
        try:
            for _ in range(self.plan.warmup):
                self._take_refusals(self._round(image))
            for _ in range(runs):
                line = self._round(image)
                resume_file.append(line)
                self._record(line)
        except UserError as e:  # with all visual tokens
            line = Round(image, self.count(image), skipped=str(e))
            resume_file.append(line)
            self._record(line)

    def _record(self, line: Round) -> None:
        self.rounds.append(line)
        self._take_refusals(line)
        if line.skipped:
            self.skipped[line.image] = line.skipped

    def _take_refusals(self, line: Round) -> None:
        self.failures |= {(line.image, case): why for case, why in line.refused}

    def _round(self, image: int) -> Round:
        """One answer of each case that has not failed. Raises UserError where full fails."""
        line = Round(image, self.count(image))
        working = [p for p in range(len(self.cases)) if (image, p) not in self.failures]

        def answer_full() -> Measurement:
            line.full.append(self._measure(image, self.full))
            return line.full[-1]

        def attempt(case: BudgetedMethod) -> Measurement | UserError:
            try:
                return self._measure(image, case)
            except UserError as e:
                return e

        calls = [partial(attempt, self.cases[p]) for p in working]
        for i, outcome, _ in take_turns(answer_full, calls, self.plan.share):
            if isinstance(outcome, UserError):
                line.refused.append((working[i], str(outcome)))
            else:
                line.pruned.append(PrunedRun(working[i], len(line.full) - 1, outcome))
        return line

    def _measure(self, image: int, case: BudgetedMethod) -> Measurement:
        """An answer about an image, timed from its file to its last token."""
        budget = {"keep_tokens" if isinstance(case.K, int) else "keep_ratio": case.K}
        source = [*self.images.values()][image]
        start = time.perf_counter()
        answer = self.answer(
            image=source, pruner=case.pipeline, positions=case.pipeline.policy, **budget
        )
        total_ms = 1000 * (time.perf_counter() - start)
        self.advance_bar(1)
        return Measurement.of(answer, total_ms)
