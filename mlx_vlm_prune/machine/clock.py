"""The clock of a request: how long each part of it takes.

A part ends where its arrays are computed. Models call `lap` at these places; without a running
clock nothing is waited for, and MLX computes all parts in one go.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypedDict

import mlx.core as mx

PARTS = ("image", "vision", "pruner", "prefill")
UNPRUNED = "vision and prefill"  # in one lap, as mlx-vlm computes them where nothing is pruned
WITHIN = {"projector": "prefill"}  # parts that a user reads as part of another

_running: ContextVar["Clock | None"] = ContextVar("_running", default=None)


class Timings(TypedDict):
    """Milliseconds up to the first token, by part; None where a part was not timed alone."""

    image: float  # opening and preprocessing
    vision: float | None  # the tower
    pruner: float | None
    prefill: float | None  # projector, splicing and the language model
    total: float


class Clock:
    """Milliseconds of each part since it was made; `parts` are those that it tells apart."""

    def __init__(self, parts: Sequence[str] = PARTS) -> None:
        self.start = self.last = time.perf_counter()
        self.ms: dict[str, float] = dict.fromkeys(parts, 0.0)

    def lap(self, name: str, value: Any = None) -> Any:
        """Compute the value, count the time since the last lap, and return the value.

        `value` is an array, a tree of arrays, or has them in its attribute `arrays`.
        """
        if value is not None:
            mx.eval(getattr(value, "arrays", value))
        now = time.perf_counter()
        self.ms[self.part(name)] += 1000 * (now - self.last)
        self.last = now
        return value

    def part(self, name: str) -> str:
        """The part that a lap is counted in."""
        return name if name in self.ms else WITHIN[name]

    def ttft(self) -> Timings:
        """The parts and their total up to the last lap, which ends with the first token."""
        return Timings(
            image=self.ms["image"],
            vision=self.ms.get("vision"),
            pruner=self.ms.get("pruner"),
            prefill=self.ms.get("prefill"),
            total=1000 * (self.last - self.start),
        )

    @contextmanager
    def running(self) -> Iterator["Clock"]:
        """Inside the block, `lap` is this clock's."""
        token = _running.set(self)
        try:
            yield self
        finally:
            _running.reset(token)


def lap(name: str, value: Any = None) -> Any:
    """A lap of the running clock, if there is one; returns the value."""
    clock = _running.get()
    return clock.lap(name, value) if clock else value
