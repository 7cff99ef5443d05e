"""Timed runs in turns, the spread of their times, and when a gain is reported.

A machine's speed drifts, so full and pruned runs alternate in one process. A gain is the median
ratio of neighbours: the time of a full run by that of each pruned run after it.

A gain is reported only if there are several of these ratios, and their spread (10th to 90th
percentile) is not larger than |median - 1|. Otherwise noise explains it.
"""

import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from tqdm import tqdm

Outcome = TypeVar("Outcome")  # what a run returns
FullOutcome = TypeVar("FullOutcome")
NOT_REPORTED = "not told: spread larger than the difference"


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, first and last decile of the values; a single value is all three."""
    deciles = statistics.quantiles(values, n=10) if len(values) > 1 else [values[0]] * 9
    low, high = max(deciles[0], min(values)), min(deciles[-1], max(values))
    return {"median": statistics.median(values), "p10": low, "p90": high}


@dataclass(frozen=True)
class Gain:
    """How many times as fast pruned is as full: median and deciles of the neighbours' ratios, and
    how many there are."""

    median: float
    p10: float
    p90: float
    runs: int

    @classmethod
    def of(cls, full: Sequence[float], pruned: Sequence[float]) -> "Gain":
        pairs = zip(full, pruned, strict=True)
        ratios = [full_ms / pruned_ms for full_ms, pruned_ms in pairs]
        return cls(**spread(ratios), runs=len(ratios))

    @property
    def is_clear(self) -> bool:
        """Whether the ratios, several of them, spread by no more than their median differs from
        1."""
        return self.runs > 1 and self.p90 - self.p10 <= abs(self.median - 1)

    @property
    def reported(self) -> float | None:
        """The median, or None unless it is clear."""
        return self.median if self.is_clear else None

    def report(self, predicted: float | None) -> dict[str, Any]:
        """The gain as a JSON object of a result; `realised` is None unless the gain is clear."""
        of_predicted = self.reported / predicted if self.reported and predicted else None
        return {
            "realised": self.reported, "p10": self.p10, "p90": self.p90, "predicted": predicted,
            "of_predicted": of_predicted,
        }  # fmt: skip


def times_text(gain: float | None, unclear: str = "?") -> str:
    """A gain as "1.50x", or `unclear` if it is None."""
    return unclear if gain is None else f"{gain:.2f}x"


def turns(pruned: int, share: int) -> Iterator[int | None]:
    """The order of one round: None, a full run, before every `share` pruned runs, by number."""
    for i in range(pruned):
        if i % share == 0:
            yield None
        yield i


def take_turns(
    full: Callable[[], FullOutcome], pruned: Sequence[Callable[[], Outcome]], share: int
) -> Iterator[tuple[int, Outcome, FullOutcome]]:
    """Run one round; yield (number, pruned run, full run before it)."""
    before: list[FullOutcome] = []
    for i in turns(len(pruned), share):
        if i is None:
            before = [full()]
        else:
            yield i, pruned[i](), before[0]


def alternate(
    full: Callable[[], Outcome],
    pruned: Sequence[Callable[[], Outcome]],
    runs: int,
    warmup: int,
    share: int,
    title: str,
) -> Iterator[tuple[int, Outcome, Outcome]]:
    """Run rounds of turns with a progress bar; yield (number, pruned run, full run before it).

    The `warmup` rounds are run and left out.
    """
    total = (warmup + runs) * len([*turns(len(pruned), share)])
    with tqdm(total=total, desc=title, file=sys.stderr, leave=False) as bar:

        def counted(run: Callable[[], Outcome]) -> Callable[[], Outcome]:
            def timed_run() -> Outcome:
                outcome = run()
                bar.update()
                return outcome

            return timed_run

        for number in range(warmup + runs):
            for pair in take_turns(counted(full), [*map(counted, pruned)], share):
                if number >= warmup:
                    yield pair
