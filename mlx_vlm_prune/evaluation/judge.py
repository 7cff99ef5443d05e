"""What answers are worth: figures per kind and overall, beside full and beside `random`.

A group of questions that are judged together is the unit, of which means are taken and which
is drawn in the bootstrap; a question without a group is one of its own.

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

BESIDE = ("overall", "loyalty", "logprob")  # figures that are of no kind


@dataclass(frozen=True)
class Sheet:
    """All answers: the texts, whether they are full's own, the right ones' log-probabilities."""

    questions: list[Question]
    said_PQ: list[list[str]]
    loyal_PQ: np.ndarray
    logprob_PQ: np.ndarray


def check_kinds(kinds: Iterable[str]) -> None:
    """Refuse a kind that is called as a figure is: the two stand beside each other."""
    if wrong := set(kinds) & set(BESIDE):
        raise UserError(f"no kind of question can be called {wrong.pop()}; rename it")


class Judge:
    """The rules of a format, for one set of questions."""

    def __init__(self, format: Format, questions: Sequence[Question], seed: int):
        self.format, self.questions, self.seed = format, list(questions), seed
        members: dict[tuple[str, str, int], list[int]] = {}
        for n, q in enumerate(questions):
            alone = (q.kind, "", n)
            members.setdefault((q.kind, q.group, 0) if q.group else alone, []).append(n)
        self.members = list(members.values())
        self.kinds = list(dict.fromkeys(q.kind for q in questions))
        check_kinds(self.kinds)
        kind_G = np.array([kind for kind, _, _ in members])
        self.of_kind = {kind: np.flatnonzero(kind_G == kind) for kind in self.kinds}
        self.size_G = np.array([len(group) for group in self.members], np.float64)
        self.factor = format.scale / 100 if format.unit == "%" else format.scale

    def rng(self, name: str) -> np.random.Generator:
        """Draws of its own for every figure: kinds of one size must not be drawn alike."""
        return np.random.default_rng([self.seed, *name.encode()])

    def scores(self, said: Sequence[str]) -> np.ndarray:
        """Of every question, (Q,)."""
        pairs = zip(self.questions, said, strict=True)
        return np.array([self.format.score(q, text) for q, text in pairs], np.float64)

    def worth(self, score_Q: np.ndarray) -> np.ndarray:
        """Of every group, as it counts, (G,)."""
        together = [self.format.together(score_Q[group].tolist()) for group in self.members]
        return self.factor * np.array(together, np.float64)

    def sums(self, value_Q: np.ndarray) -> np.ndarray:
        """A figure summed over the questions of every group, (G,)."""
        return np.array([value_Q[group].sum() for group in self.members])

    def majority(self) -> dict[str, float]:
        """Each kind's figure for always giving its most frequent answer, without looking."""
        most = {
            kind: Counter(q.answers[0] for q in self.questions if q.kind == kind).most_common(1)
            for kind in self.kinds
        }
        worth_G = self.worth(self.scores([most[q.kind][0][0] for q in self.questions]))
        return {kind: short(worth_G[own].mean()) for kind, own in self.of_kind.items()}

    def rows(self, sheet: Sheet, full: int, random: Sequence[int | None]) -> list[dict[str, Any]]:
        """A row of figures a method; `full` and `random[p]` say which are its yardsticks."""
        score_PQ = np.array([self.scores(said) for said in sheet.said_PQ])
        worth_GP = np.array([self.worth(score_Q) for score_Q in score_PQ]).T
        others = {"loyalty": sheet.loyal_PQ.astype(np.float64), "logprob": sheet.logprob_PQ}
        sums_GP = {name: np.array([self.sums(v) for v in x]).T for name, x in others.items()}
        told = Figures(self, worth_GP, sums_GP)
        rows = []
        for p in tqdm(range(len(random)), desc="judging", file=sys.stderr, delay=2, leave=False):
            score_Q, row = score_PQ[p], told.row(p) | {"to_full": told.apart(p, full)}
            if (r := random[p]) is not None:
                row["to_random"] = told.apart(p, r)
            more = self.format.more(self.questions, list(sheet.said_PQ[p]))
            row |= {"more": {name: short(x) for name, x in more.items()}} if more else {}
            if np.isin(score_Q, (0, 1)).all():
                row["right"] = np.packbits(score_Q.astype(bool)).tobytes().hex()
            rows.append(row)
        return rows


class Figures:
    """Every figure of all methods, and the same figures resampled."""

    def __init__(self, judge: Judge, worth_GP: np.ndarray, sums_GP: dict[str, np.ndarray]):
        ones_G = np.ones(len(worth_GP))
        self.kinds = judge.kinds
        sizes = {kind: len(own) for kind, own in judge.of_kind.items()}
        strata = min(sizes.values()) if judge.format.total == "sum" else len(worth_GP)
        self.groups = {**dict.fromkeys(BESIDE, len(worth_GP)), "overall": strata, **sizes}
        self.mean_P = {kind: worth_GP[own].mean(axis=0) for kind, own in judge.of_kind.items()}
        self.drawn_RP = {
            kind: resampled(worth_GP[own], ones_G[own], judge.rng(kind))
            for kind, own in judge.of_kind.items()
        }
        if judge.format.total == "sum":  # kinds are strata: each is drawn from on its own
            overall_P = np.sum([*self.mean_P.values()], axis=0)
            overall_RP = np.sum([*self.drawn_RP.values()], axis=0)
        else:
            overall_P = worth_GP.mean(axis=0)
            overall_RP = resampled(worth_GP, ones_G, judge.rng("overall"))
        self.mean_P["overall"], self.drawn_RP["overall"] = overall_P, overall_RP
        for name, sum_GP in sums_GP.items():
            self.mean_P[name] = sum_GP.sum(axis=0) / judge.size_G.sum()
            self.drawn_RP[name] = resampled(sum_GP, judge.size_G, judge.rng(name))

    def row(self, p: int) -> dict[str, Any]:
        own = {name: short(mean_P[p]) for name, mean_P in self.mean_P.items()}
        accuracy = {kind: own.pop(kind) for kind in self.kinds}
        return {"accuracy": accuracy, **own}

    def apart(self, p: int, other: int) -> dict[str, list[float | None]]:
        """Every figure's difference to another method's, with its 95 % interval."""
        return {
            name: interval(
                self.mean_P[name][p] - self.mean_P[name][other],
                self.drawn_RP[name][:, p] - self.drawn_RP[name][:, other],
                self.groups[name],
            )
            for name in (*BESIDE, *self.kinds)
        }
