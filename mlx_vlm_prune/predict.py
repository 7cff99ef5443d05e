"""What K visual tokens will take: from a calibration's runs to milliseconds and bytes.

The tower and the pruner are predicted from K, the prefill from the rows that are read (words, and
K tokens of every image), all by straight lines between the medians of the runs. How fast a machine
is changes from minute to minute, so a few runs before a choice tell its present `level`, a factor.
How far a run strays from the level of those before it is known from the calibration's own runs,
the error of the lines included; `slack` is the 95th percentile of that. A K whose prediction times
level and slack is within a wish meets it in about 19 of 20 runs. No slack is below STEADY: a
calibration of half a minute does not see how a machine drifts.

A part is one of vision, pruner and prefill. Rows of a decoder method are those of the average
layer, as its budget is.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import Any, NamedTuple

import numpy as np

PARTS = ("vision", "pruner", "prefill")
SURE = 0.95  # share of runs that are to stay within a wish
BEFORE = 3  # runs that tell the level
STEADY = 1.06  # the least slack, however steady the calibration was: docs/log.md


class Place(NamedTuple):
    """Where a run was: K of N tokens of each image, and so many words."""

    K: int
    text: int
    images: int

    @property
    def rows(self) -> int:
        return self.text + self.images * self.K


@dataclass(frozen=True)
class Run:
    """What each part took, in ms, and the most bytes it held beside the weights and the pixels."""

    place: Place
    ms: Mapping[str, float]
    nbytes: Mapping[str, float]


@dataclass(frozen=True)
class Calibration:
    """Runs of one model with one pruner, in order; `about` says on which machine, and with what.

    Those with one image and the shortest text show what K does; the others, what more words and
    more images add. With K = N nothing is pruned. `row_bytes` are those of a cache row in all
    layers together.
    """

    pruner: str
    N: int
    in_tower: bool  # does the tower's work depend on K?
    row_bytes: int
    runs: tuple[Run, ...]
    about: Mapping[str, Any]

    def ms(self, K: int, text: int, images: int) -> dict[str, float]:
        """Each part's expected time up to the first token; opening the image is not in it."""
        return self._time(Place(K, text, images))

    def nbytes(self, K: int, text: int, images: int) -> dict[str, float]:
        """The most that each part holds beside the weights and the pixels."""
        return self._memory(Place(K, text, images))

    @cached_property
    def slack(self) -> float:
        """By what factor 19 of 20 runs take longer than those before let expect, at most."""
        level = [sum(run.ms.values()) / sum(self.ms(*run.place).values()) for run in self.runs]
        strays = sorted(level[i] / median(level[i - BEFORE : i]) for i in range(BEFORE, len(level)))
        return max(STEADY, strays[math.ceil(SURE * len(strays)) - 1])

    @cached_property
    def places(self) -> list[Place]:
        """Where the runs were, each once."""
        return list(dict.fromkeys(run.place for run in self.runs))

    @property
    def middle(self) -> Place:
        """One image, little text, about half of the tokens."""
        usual = [p for p in self.places if p.images == 1 and p.text == self._time.short]
        return min(usual, key=lambda place: abs(place.K - self.N / 2))

    @property
    def longest(self) -> int:
        """The most words that were run."""
        return max(place.text for place in self.places)

    @property
    def most_images(self) -> int:
        """The most images that were run."""
        return max(place.images for place in self.places)

    @cached_property
    def _time(self) -> "Lines":
        return self._lines([(run.place, run.ms) for run in self.runs], median)

    @cached_property
    def _memory(self) -> "Lines":
        return self._lines([(run.place, run.nbytes) for run in self.runs], max)

    def _lines(self, told: list, together: Any) -> "Lines":
        found = []
        for place in self.places:
            here = [figures for at, figures in told if at == place]
            found.append((place, {part: together(f[part] for f in here) for part in PARTS}))
        return Lines(found, self.N, self.in_tower)


class Lines:
    """Straight lines between the places that were run, one figure a part."""

    def __init__(self, told: Iterable[tuple[Place, Mapping[str, float]]], N: int, in_tower: bool):
        self.told, self.N, self.in_tower = list(told), N, in_tower
        points = [p for p, _ in self.told]
        self.short, self.long = (f(p.text for p in points) for f in (min, max))
        self.images = max(p.images for p in points)
        self.rows = sorted({p.rows for p in points})
        self.prefill = rising(
            [median(f["prefill"] for p, f in self.told if p.rows == rows) for rows in self.rows]
        )

    def __call__(self, at: Place) -> dict[str, float]:
        """Each part's figure."""
        many = (at.images - 1) / max(1, self.images - 1)
        wordy = (at.text - self.short) / max(1, self.long - self.short)
        figures = {part: self._one(part, at.K) for part in PARTS[:2]}
        for part in figures:
            figures[part] *= self._growth(part, [t for t in self.told if t[0].images > 1], many)
        longer = [t for t in self.told if t[0].text > self.short and t[0].images == 1]
        figures["pruner"] *= self._growth("pruner", longer, wordy)
        return {**figures, "prefill": self._read(at.rows)}

    def _one(self, part: str, K: int) -> float:
        """Of one image and the shortest text."""
        if part == "vision" and not self.in_tower:
            return median(f[part] for p, f in self.told if p.images == 1)
        one = [(p.K, f[part]) for p, f in self.told if p.images == 1 and p.text == self.short]
        if K == self.N:
            return median(value for k, value in one if k == K)
        pruned = sorted(pair for pair in one if pair[0] < self.N)
        return float(np.interp(K, [k for k, _ in pruned], [value for _, value in pruned]))

    def _growth(self, part: str, told: list, share: float) -> float:
        """By what factor a part grows when it goes a share of the way to these points."""
        ratios = [f[part] / one for p, f in told if p.K < self.N and (one := self._one(part, p.K))]
        return max(0.0, 1 + share * (median(ratios) - 1)) if ratios else 1.0

    def _read(self, rows: int) -> float:
        """Of the prefill; beyond the most rows that were run, as steep as before."""
        x, y = self.rows, self.prefill
        if rows <= x[-1] or len(x) == 1:
            return float(np.interp(rows, x, y))
        return y[-1] + (rows - x[-1]) * (y[-1] - y[-2]) / (x[-1] - x[-2])


def rising(values: Sequence[float]) -> list[float]:
    """The nearest values, by least squares, none of which is below the one before it."""
    runs: list[list[float]] = []
    for value in values:
        runs.append([value])
        while len(runs) > 1 and _mean(runs[-2]) > _mean(runs[-1]):
            runs[-2:] = [runs[-2] + runs[-1]]
    return [_mean(run) for run in runs for _ in run]


def _mean(run: list[float]) -> float:
    return sum(run) / len(run)
