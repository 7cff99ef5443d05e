"""Timed runs in turns, the spread of their times, and when a gain is reported.

A machine's speed drifts, so full and pruned runs alternate in one process. A gain is the median
ratio of neighbours: the time of a full run by that of each pruned run after it.

A gain is reported only if the spread of these ratios (10th to 90th percentile) is not larger
than |median - 1|. Otherwise noise explains it.
"""

import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from tqdm import tqdm

Outcome = TypeVar("Outcome")  # what a run returns
NOT_REPORTED = "not told: spread larger than the difference"
PARTS = ("image", "vision", "pruner", "projector", "prefill")  # up to the first token


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, first and last decile of the values; a single value is all three."""
    deciles = statistics.quantiles(values, n=10) if len(values) > 1 else [values[0]] * 9
    low, high = max(deciles[0], min(values)), min(deciles[-1], max(values))
    return {"median": statistics.median(values), "p10": low, "p90": high}


@dataclass(frozen=True)
class Gain:
    """How many times as fast pruned is as full: median and deciles of the neighbours' ratios."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, full: Sequence[float], pruned: Sequence[float]) -> "Gain":
        pairs = zip(full, pruned, strict=True)
        return cls(**spread([full_ms / pruned_ms for full_ms, pruned_ms in pairs]))

    @property
    def is_clear(self) -> bool:
        """Whether the ratios spread by no more than their median differs from 1."""
        return self.p90 - self.p10 <= abs(self.median - 1)

    @property
    def reported(self) -> float | None:
        """The median, or None unless it is clear."""
        return self.median if self.is_clear else None

    def report(self, predicted: float) -> dict[str, Any]:
        """The gain as a JSON object of a result; `realised` is None unless the gain is clear."""
        return {
            "realised": self.reported, "p10": self.p10, "p90": self.p90, "predicted": predicted,
            "of_predicted": self.reported and self.reported / predicted,
        }  # fmt: skip


def times_text(gain: float | None, unclear: str = "?") -> str:
    """A gain as "1.50x", or `unclear` if it is None."""
    return unclear if gain is None else f"{gain:.2f}x"


@dataclass(frozen=True)
class Run:
    """One timed request: milliseconds of each of PARTS, the mean of a new token, and memory.

    `cache_bytes` is the cache's size after the prompt. `peak_bytes` is None where the device does
    not count it. `token_ids` has each prompt's new tokens.
    """

    ms: dict[str, float]
    token_ms: float
    cache_bytes: int
    peak_bytes: int | None
    token_ids: list[list[int]]

    @property
    def figures(self) -> dict[str, float]:
        """Milliseconds of each part, of a new `token`, and of the first token in `total`."""
        return {**self.ms, "total": sum(self.ms.values()), "token": self.token_ms}


def turns(pruned: int, share: int) -> Iterator[int | None]:
    """The order of one round: None, a full run, before every `share` pruned runs, by number."""
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
    """Run rounds of turns with a progress bar; yield (number, pruned run, full run before it).

    The `warmup` rounds are run and left out.
    """
    order = [*turns(len(pruned), share)] * (warmup + runs)
    first_counted = len(order) // (warmup + runs) * warmup
    before: Outcome | None = None
    for turn, i in enumerate(tqdm(order, desc=title, file=sys.stderr, leave=False)):
        if i is None:
            before = full()
        else:
            assert before is not None, "full goes first"
            outcome = pruned[i]()
            if turn >= first_counted:
                yield i, outcome, before
