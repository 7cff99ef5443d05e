"""Times, their spread, and when a ratio may be told.

Machines drift, so full and pruned take turns in one process, and a gain is the median of
the ratios of neighbours: each pruned run beside the full run before it.

A gain is told only when the spread of these ratios, from the tenth to the ninetieth
percentile, is not larger than the difference: |median - 1|. Otherwise nobody can tell whether
there is one, and it is not reported.
"""

import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from tqdm import tqdm

Outcome = TypeVar("Outcome")  # of a run, whatever is told of it
NOT_TOLD = "not told: spread larger than the difference"
PARTS = ("image", "vision", "pruner", "projector", "prefill")  # up to the first token


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and first and last decile; of a single value, itself."""
    deciles = statistics.quantiles(values, n=10) if len(values) > 1 else [values[0]] * 9
    low, high = max(deciles[0], min(values)), min(deciles[-1], max(values))
    return {"median": statistics.median(values), "p10": low, "p90": high}


@dataclass(frozen=True)
class Gain:
    """How many times as fast pruned is as full: the median of neighbours, and its spread."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, full: Sequence[float], pruned: Sequence[float]) -> "Gain":
        pairs = zip(full, pruned, strict=True)
        return cls(**spread([one / other for one, other in pairs]))

    @property
    def is_told(self) -> bool:
        return self.p90 - self.p10 <= abs(self.median - 1)

    @property
    def told(self) -> float | None:
        """The median, if it may be told."""
        return self.median if self.is_told else None

    def report(self, predicted: float) -> dict[str, Any]:
        """As it stands in a result; an untold ratio has no median there."""
        return {
            "realised": self.told, "p10": self.p10, "p90": self.p90, "predicted": predicted,
            "of_predicted": self.told and self.told / predicted,
        }  # fmt: skip


def times(gain: float | None, untold: str = "?") -> str:
    """How many times as fast, or `untold` where the spread was too large."""
    return untold if gain is None else f"{gain:.2f}x"


@dataclass(frozen=True)
class Run:
    """One request: milliseconds of each of PARTS, of a new token on average, and what was held.

    `peak_bytes` is None where nobody counts. `said` has each prompt's new tokens.
    """

    ms: dict[str, float]
    token_ms: float
    cache_bytes: int
    peak_bytes: int | None
    said: list[list[int]]

    @property
    def figures(self) -> dict[str, float]:
        """Milliseconds by name, and `total`: from the image's file to the first token."""
        return {**self.ms, "total": sum(self.ms.values()), "token": self.token_ms}


def turns(pruned: int, share: int) -> Iterator[int | None]:
    """Whose turn it is in a round: None is full, which goes before every `share` pruned ones."""
    for i in range(pruned):
        if i % share == 0:
            yield None
        yield i


def alternate(
    full: Callable[[], Outcome],
    pruned: Sequence[Callable[[], Outcome]],
    runs: int,
    warmup: int,
    share: int,
    title: str,
) -> Iterator[tuple[int, Outcome, Outcome]]:
    """Rounds of turns: (which, pruned, the full run before it), warm-up left out. Shows progress
    under a title."""
    order = [*turns(len(pruned), share)] * (warmup + runs)
    counted = len(order) // (warmup + runs) * warmup
    before: Outcome | None = None
    for turn, i in enumerate(tqdm(order, desc=title, file=sys.stderr, leave=False)):
        if i is None:
            before = full()
        else:
            assert before is not None, "full goes first"
            done = pruned[i]()
            if turn >= counted:
                yield i, done, before
