"""What the last evaluation of a model says of methods at a share of the visual tokens.

It is the largest one that `evaluate` has kept of the very model (machine/remembered.py). What an
installation knows of the built-in model lies in scenes/evaluation.json, which
`python -m benchmarks.report` makes from benchmarks/results/scenes.json.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ...checkpoints.errors import UserError
from ...checkpoints.reading.files import read_json
from ...machine.remembered import FEWEST, remembered_files
from ...scenes import CHECKPOINT, EVALUATION
from ..spec import AUTO

# Methods that are no baseline: of fewer an evaluation does not say which is best.
FEWEST_METHODS = 3
BASELINES = ("random", "uniform", "avgpool", "downsample")  # below which no method is chosen
# What a file may have in place of a result.
DAMAGED = (UserError, KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError)


@dataclass(frozen=True)
class Evidence:
    """The figures of an evaluation, from 0 to 1: by share of the tokens, ascending, and method.

    `tokens` are those of an image, in the mean; `full` is the figure with all of them.
    """

    questions: str
    count: int
    date: str
    tokens: int
    full: float
    by_share: Mapping[float, Mapping[str, float]]

    @classmethod
    def of(cls, result: Mapping[str, Any]) -> "Evidence":
        """Of a result of `evaluate`. Raises one of DAMAGED."""
        rows, by_share = result["rows"], dict[float, dict[str, float]]()
        (full, *_) = (row for row in rows if row["pruner"] == "none")
        for row in rows:
            share, figure = round(row["tokens"] / row["of"], 4), float(row["overall"])
            # A row of `auto` is one of the method that it chose.
            name = row.get("chosen", AUTO) if row["pruner"] == AUTO else row["pruner"]
            if share < 1 and name != AUTO and math.isfinite(figure):
                by_share.setdefault(share, {})[str(name)] = figure
        ascending = {share: by_share[share] for share in sorted(by_share)}
        date = str(result.get("date", ""))[:10]
        count, questions = int(result["count"]), str(result["questions"])
        whole = float(full["overall"])
        return cls(questions, count, date, int(full["of"]), whole, ascending)

    @property
    def says_something(self) -> bool:
        """Are there enough questions, right answers, and methods?"""
        names = {name for figures in self.by_share.values() for name in figures}
        is_enough = len(names - {*BASELINES}) >= FEWEST_METHODS
        return self.count >= FEWEST and self.full > 0 and is_enough

    @property
    def about(self) -> str:
        """Which evaluation it is, in a sentence."""
        when = f", {self.date}" if self.date else ""
        return f"the evaluation of this model ({self.questions}, {self.count:,} questions{when})"

    def ranked(self, share: float) -> list[tuple[str, float]]:
        """The methods with their figures at a share, the best first; none that is below a baseline
        at one of the two evaluated shares around it.

        Between these the figure is taken from a straight line over the log of the share; beyond
        the least and the largest one it is that one's.
        """
        low, high, weight = self._around(share)
        figures = {
            name: (1 - weight) * self.by_share[low][name] + weight * self.by_share[high][name]
            for name in self.by_share[low]
            if name in self.by_share[high]
            and all(self.by_share[s][name] >= self._floor(s) for s in (low, high))
        }
        return sorted(figures.items(), key=lambda item: -item[1])

    def mean(self, name: str) -> float:
        """A method's mean over all evaluated shares; of one that it could not keep, 0."""
        return sum(row.get(name, 0.0) for row in self.by_share.values()) / len(self.by_share)

    def random(self, share: float) -> float | None:
        """The figure of `random` at a share, where it was evaluated."""
        low, high, weight = self._around(share)
        pair = [self.by_share[s].get("random") for s in (low, high)]
        if pair[0] is None or pair[1] is None:
            return None
        return (1 - weight) * pair[0] + weight * pair[1]

    def where(self, share: float) -> str:
        """With how many of the tokens a figure of that share was evaluated, in a sentence."""
        low, high, weight = self._around(share)
        if weight:
            return f"with {share:.3g} of the tokens (between {low:.3g} and {high:.3g})"
        near = "" if abs(share - low) < 0.01 else f", the nearest to {share:.3g}"
        return f"with {low:.3g} of the tokens{near}"

    def _floor(self, share: float) -> float:
        """The best of the baselines at an evaluated share."""
        figures = self.by_share[share]
        return max((figures[name] for name in BASELINES if name in figures), default=0.0)

    def _around(self, share: float) -> tuple[float, float, float]:
        """The evaluated shares on either side of one, and how far it is from the lower one."""
        shares, share = self.shares, round(share, 4)  # as these are
        low = max((s for s in shares if s <= share), default=shares[0])
        high = min((s for s in shares if s >= share), default=shares[-1])
        if low >= high:  # it was evaluated, or lies beyond all
            return low, low, 0.0
        return low, high, math.log(share / low) / math.log(high / low)

    @property
    def shares(self) -> list[float]:
        """Those that were evaluated, ascending."""
        return [*self.by_share]


def evidence_of(folder: Path | None) -> Evidence | None:
    """What is known of the model in `folder`, by the most questions; None for nothing."""
    if folder is None:
        return None
    try:
        paths = remembered_files(folder)
    except UserError:  # a folder without weights
        paths = []
    if folder.resolve() == CHECKPOINT.resolve():
        paths.append(EVALUATION)
    known = [each for path in paths if (each := _read(path)) and each.says_something]
    return max(known, key=lambda each: each.count, default=None)


def _read(path: Path) -> Evidence | None:
    """A file's evidence; None where it is damaged, or is not there. Each request asks."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return _read_version(path, stat.st_mtime_ns, stat.st_size, stat.st_ino)


@lru_cache(maxsize=64)
def _read_version(path: Path, *version: int) -> Evidence | None:
    try:
        return Evidence.of(read_json(path, most=None))
    except DAMAGED:
        return None
