"""The clock of a request: how long each part of it takes.

Models call `end_part` where a part ends. A running clock then waits until the part's arrays are
computed; without one nothing is waited for, and MLX computes all parts together. So it is with a
request on a GPU, which would be idle while the host gets the next part ready.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypedDict

import mlx.core as mx

from .hardware import on_cpu

PARTS = ("image", "vision", "pruner", "prefill")
TOGETHER = "vision to prefill"  # what is between the image and the first token, as one part
COUNTED_IN = {"projector": "prefill"}  # parts that users see as part of another

_running_clock: ContextVar["Clock | None"] = ContextVar("_running_clock", default=None)
_times_parts: ContextVar[bool] = ContextVar("_times_parts", default=False)


class Timings(TypedDict):
    """Milliseconds up to the first token, by part; None where a part was not timed alone."""

    image: float  # opening and preprocessing
    vision: float | None  # the tower
    pruner: float | None
    prefill: float | None  # projector, splicing and the language model
    total: float


class Clock:
    """Milliseconds of each of `parts`, from the clock's creation on."""

    def __init__(self, parts: Sequence[str] = PARTS) -> None:
        self.start = self.last = time.perf_counter()
        self.ms: dict[str, float] = dict.fromkeys(parts, 0.0)

    def end_part(self, name: str, value: Any = None) -> Any:
        """Compute the value, add the time since the last part's end, and return the value.

        `value` is an array, a tree of arrays, or has them in its attribute `arrays`.
        """
        if value is not None:
            mx.eval(getattr(value, "arrays", value))
        now = time.perf_counter()
        self.ms[self.part(name)] += 1000 * (now - self.last)
        self.last = now
        return value

    def resume(self) -> None:
        """Go on after a wait, which counts in no part."""
        now = time.perf_counter()
        self.start += now - self.last
        self.last = now

    def part(self, name: str) -> str:
        """The part among `ms` that a named part is counted in."""
        name = name if name in self.ms else COUNTED_IN.get(name, name)
        return name if name in self.ms else TOGETHER

    def ttft(self) -> Timings:
        """The parts and their total up to the last end, which is the first token."""
        return Timings(
            image=self.ms.get("image", 0.0),
            vision=self.ms.get("vision"),
            pruner=self.ms.get("pruner"),
            prefill=self.ms.get("prefill"),
            total=1000 * (self.last - self.start),
        )

    @contextmanager
    def running(self) -> Iterator["Clock"]:
        """Inside the block, `end_part` is this clock's."""
        token = _running_clock.set(self)
        try:
            yield self
        finally:
            _running_clock.reset(token)


def end_part(name: str, value: Any = None) -> Any:
    """Compute the value and time the part where a clock of parts runs; returns the value."""
    clock = _running_clock.get()
    return clock.end_part(name, value) if clock and TOGETHER not in clock.ms else value


@contextmanager
def timing_parts() -> Iterator[None]:
    """Inside the block, requests on a GPU are timed by part, too, and take longer."""
    token = _times_parts.set(True)
    try:
        yield
    finally:
        _times_parts.reset(token)


def request_clock() -> Clock:
    """A request's clock: of all parts on a CPU; on a GPU of the image and all else together."""
    return Clock(PARTS if on_cpu() or _times_parts.get() else ("image", TOGETHER))
