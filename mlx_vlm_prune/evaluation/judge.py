"""Scores of methods: figures for each kind and overall, compared with full and with `random`.

The unit is a group of questions that are scored together: means are over groups, and the
bootstrap draws groups. A question without a group is a group of one.

Shapes: Q questions, G groups, P methods with their budgets, R resamples.
"""

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from ..checkpoints.errors import UserError
from .bootstrap import interval, resampled, short
from .questions import Format, Question

OVERALL_FIGURES = ("overall", "loyalty", "logprob")  # those over all kinds


@dataclass(frozen=True)
class AnswerTable:
    """All answers of all methods."""

    questions: list[Question]
    responses_PQ: list[list[str]]
    loyal_PQ: np.ndarray  # the same ids as full's
    logprob_PQ: np.ndarray  # of the right answers


def check_kinds(kinds: Iterable[str]) -> None:
    """Raises UserError for a kind with the name of a figure: both are keys of one table."""
    if wrong := set(kinds) & set(OVERALL_FIGURES):
        raise UserError(f"no kind of question can be called {wrong.pop()}; rename it")


class Judge:
    """The rules of a format, for one set of questions."""

    def __init__(self, format: Format, questions: Sequence[Question], seed: int):
        self.format, self.questions, self.seed = format, list(questions), seed
        groups: dict[tuple[str, str, int], list[int]] = {}
        for n, q in enumerate(questions):
            key = (q.kind, q.group, 0) if q.group else (q.kind, "", n)
            groups.setdefault(key, []).append(n)
        self.groups = list(groups.values())  # of each the numbers of its questions
        self.is_scored = format.is_scored(self.questions)
        self.has_answers = all(q.answers for q in questions)
        self.kinds = list(dict.fromkeys(q.kind for q in questions))
        check_kinds(self.kinds)
        kind_G = np.array([kind for kind, _, _ in groups])
        self.groups_of_kind = {kind: np.flatnonzero(kind_G == kind) for kind in self.kinds}
        self.size_G = np.array([len(group) for group in self.groups], np.float64)
        self.factor = format.scale / 100 if format.unit == "%" else format.scale

    def rng(self, name: str) -> np.random.Generator:
        """A generator for one figure: equally large kinds must not be drawn alike."""
        return np.random.default_rng([self.seed, *name.encode()])

    def question_scores(self, responses: Sequence[str]) -> np.ndarray:
        """The score of every question, (Q,)."""
        pairs = zip(self.questions, responses, strict=True)
        return np.array([self.format.score(q, response) for q, response in pairs], np.float64)

    def group_scores(self, score_Q: np.ndarray) -> np.ndarray:
        """The score of every group, in the unit of the result, (G,)."""
        scores = [self.format.group_score(score_Q[group].tolist()) for group in self.groups]
        return self.factor * np.array(scores, np.float64)

    def group_sums(self, value_Q: np.ndarray) -> np.ndarray:
        """A figure summed over the questions of every group, (G,)."""
        return np.array([value_Q[group].sum() for group in self.groups])

    def majority(self) -> dict[str, float]:
        """Each kind's score of a constant answer: its most frequent one. Empty without scores."""
        if not self.is_scored or self.format.grader:
            return {}
        most_frequent = {}
        for kind in self.kinds:
            answers = Counter(q.answers[0] for q in self.questions if q.kind == kind)
            most_frequent[kind] = answers.most_common(1)[0][0]
        score_Q = self.question_scores([most_frequent[q.kind] for q in self.questions])
        score_G = self.group_scores(score_Q)
        return {kind: short(score_G[at_G].mean()) for kind, at_G in self.groups_of_kind.items()}

    def rows(
        self, answers: AnswerTable, full: int, random: Sequence[int | None]
    ) -> list[dict[str, Any]]:
        """A row of figures for each method.

        `full` is the number of the method with all tokens, `random[p]` that of `random` with the
        budget of method p. Without right answers a row has no log-probability; where the
        responses are not scored, no accuracy.
        """
        score_PQ = np.zeros((len(random), 0))
        if self.is_scored:
            score_PQ = np.array([self.question_scores(row) for row in answers.responses_PQ])
        per_question = {"loyalty": answers.loyal_PQ.astype(np.float64)}
        if self.has_answers:
            per_question["logprob"] = answers.logprob_PQ
        sums_GP = {
            name: np.array([self.group_sums(value_Q) for value_Q in value_PQ]).T
            for name, value_PQ in per_question.items()
        }
        scores = [self.group_scores(score_Q) for score_Q in score_PQ] if self.is_scored else []
        figures, rows = Figures(self, np.array(scores).T, sums_GP), []
        for p in tqdm(range(len(random)), desc="judging", file=sys.stderr, delay=2, leave=False):
            row = figures.row(p) | {"to_full": figures.differences(p, full)}
            if (r := random[p]) is not None:
                row["to_random"] = figures.differences(p, r)
            row |= self._score_details(answers.responses_PQ[p], score_PQ[p])
            rows.append(row)
        return rows

    def _score_details(self, responses: Sequence[str], score_Q: np.ndarray) -> dict[str, Any]:
        """The authors' further figures, and which questions are right, a bit each."""
        details: dict[str, Any] = {}
        if not self.is_scored:
            return details
        extra = self.format.extra_figures(self.questions, list(responses), score_Q.tolist())
        if extra:
            details["more"] = {name: short(x) for name, x in extra.items()}
        if np.isin(score_Q, (0, 1)).all():
            details["right"] = np.packbits(score_Q.astype(bool)).tobytes().hex()
        return details


class Figures:
    """All figures of all methods, and the same figures of each bootstrap resample.

    `score_GP` is empty where the responses are not scored.
    """

    def __init__(self, judge: Judge, score_GP: np.ndarray, sums_GP: dict[str, np.ndarray]):
        sizes = {kind: len(at_G) for kind, at_G in judge.groups_of_kind.items()}
        # How many groups each figure is drawn from, at least.
        self.group_counts = {**dict.fromkeys(OVERALL_FIGURES, len(judge.groups)), **sizes}
        self.kinds = judge.kinds if judge.is_scored else []
        self.mean_P: dict[str, np.ndarray] = {}
        self.mean_RP: dict[str, np.ndarray] = {}
        if judge.is_scored:
            self._add_scores(judge, score_GP)
        for name, sum_GP in sums_GP.items():
            self.mean_P[name] = sum_GP.sum(axis=0) / judge.size_G.sum()
            self.mean_RP[name] = resampled(sum_GP, judge.size_G, judge.rng(name))

    def _add_scores(self, judge: Judge, score_GP: np.ndarray) -> None:
        by_kind, ones_G = judge.groups_of_kind, np.ones(len(score_GP))
        self.mean_P = {kind: score_GP[at_G].mean(axis=0) for kind, at_G in by_kind.items()}
        self.mean_RP = {
            kind: resampled(score_GP[at_G], ones_G[at_G], judge.rng(kind))
            for kind, at_G in by_kind.items()
        }
        if judge.format.total == "sum":  # kinds are strata: each is resampled on its own
            self.group_counts["overall"] = min(len(at_G) for at_G in by_kind.values())
            overall_P = np.sum([*self.mean_P.values()], axis=0)
            overall_RP = np.sum([*self.mean_RP.values()], axis=0)
        else:
            overall_P = score_GP.mean(axis=0)
            overall_RP = resampled(score_GP, ones_G, judge.rng("overall"))
        self.mean_P["overall"], self.mean_RP["overall"] = overall_P, overall_RP

    def row(self, p: int) -> dict[str, Any]:
        """The figures of method p."""
        means = {name: short(mean_P[p]) for name, mean_P in self.mean_P.items()}
        accuracy = {kind: means.pop(kind) for kind in self.kinds}
        return {"accuracy": accuracy, **means} if accuracy else means

    def differences(self, p: int, other: int) -> dict[str, list[float | None]]:
        """The difference of every figure to another method's, with its 95 % interval."""
        return {
            name: interval(
                self.mean_P[name][p] - self.mean_P[name][other],
                self.mean_RP[name][:, p] - self.mean_RP[name][:, other],
                self.group_counts[name],
            )
            for name in (*OVERALL_FIGURES, *self.kinds)
            if name in self.mean_P
        }
