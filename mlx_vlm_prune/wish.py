"""A wish for time or memory, the largest K that meets it, and how far off that was."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .cache import STEP
from .checkpoints.errors import UserError
from .generation.result import GenerationResult
from .predict import Calibration

SPARE = 1.01  # memory hardly varies
ELSE = "a smaller image (downsample) or a method inside the tower (tome) may"


@dataclass(frozen=True)
class Wish:
    """Milliseconds to the first token, GB (10^9 bytes) at the peak of an answer, or both."""

    ms: float | None = None
    gb: float | None = None

    def __post_init__(self) -> None:
        for option, value in (("--budget-ms", self.ms), ("--budget-gb", self.gb)):
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{option} is {value}; it must be a number above 0")
        if self.ms is None and self.gb is None:
            raise UserError("give --budget-ms, --budget-gb, or both")

    def __str__(self) -> str:
        told = [f"{self.ms:g} ms"] if self.ms is not None else []
        return " and ".join([*told, *([f"{self.gb:g} GB"] if self.gb is not None else [])])


@dataclass(frozen=True)
class Request:
    """What is known of an answer before K is chosen: words, images, how long opening these took,
    the bytes held by now (weights and pixels), how many tokens it may have, and how much longer
    than when it was calibrated the machine takes at present."""

    text: int
    images: int
    image_ms: float
    held: int
    answer: int
    level: float = 1.0


@dataclass(frozen=True)
class Forecast:
    """What a K will take: expected, and `most` in 19 of 20 runs."""

    ms: float
    ms_most: float
    gb: float

    def meets(self, wish: Wish) -> bool:
        return (wish.ms is None or self.ms_most <= wish.ms) and (
            wish.gb is None or self.gb <= wish.gb
        )


def forecast(known: Calibration, asked: Request, K: int) -> Forecast:
    """Of `asked` with K tokens of each image."""
    ms = asked.image_ms + asked.level * sum(known.ms(K, asked.text, asked.images).values())
    rows = asked.text + asked.images * K + asked.answer
    cache = known.row_bytes * math.ceil(rows / STEP) * STEP  # which an answer fills
    most = max(cache, *known.nbytes(K, asked.text, asked.images).values())
    return Forecast(ms, ms * known.slack, (asked.held + SPARE * most) / 1e9)


@dataclass(frozen=True)
class Choice:
    """K of N visual tokens of each image, and what is expected of it.

    Where nothing meets the wish, `why` says so in a sentence, and K is N: nothing is pruned.
    """

    wish: Wish
    asked: Request
    pruner: str
    tokens: int
    of: int
    expected: Forecast
    why: str = ""

    @property
    def options(self) -> dict[str, Any]:
        """For `generate`."""
        return {
            "pruner": "none" if self.tokens == self.of else self.pruner,
            "keep_tokens": self.tokens,
        }

    def __str__(self) -> str:
        """The prediction, in a line."""
        told = []
        if self.wish.ms is not None:
            e = self.expected
            told.append(f"predicted {e.ms:.0f} ms (19 of 20 runs within {e.ms_most:.0f})")
        if self.wish.gb is not None:
            told.append(f"predicted {self.expected.gb:.3f} GB")
        return f"Budget: {self.wish} -> {self.tokens} of {self.of} visual tokens, {', '.join(told)}"

    def outcome(self, answer: GenerationResult) -> str:
        """How it went, in a line."""
        told = []
        if self.wish.ms is not None:
            took, expected = answer.ttft_ms["total"], self.expected.ms
            told.append(
                f"{took:.0f} ms of {self.wish.ms:g} ms (predicted {expected:.0f} ms, "
                f"{_off(took, expected)})"
            )
        if self.wish.gb is not None:
            took, expected = answer.peak_memory, self.expected.gb
            told.append(
                f"{took:.3f} GB of {self.wish.gb:g} GB (predicted {expected:.3f} GB, "
                f"{_off(took, expected)})"
            )
        return f"Budget {'met' if self.is_met(answer) else 'missed'}: {', '.join(told)}"

    def is_met(self, answer: GenerationResult) -> bool:
        took = answer.ttft_ms["total"]
        return Forecast(took, took, answer.peak_memory).meets(self.wish)

    def as_json(self, answer: GenerationResult) -> dict[str, Any]:
        """The wish, the prediction and the outcome."""
        took, gb = answer.ttft_ms["total"], answer.peak_memory
        return {
            "wish": {"ms": self.wish.ms, "gb": self.wish.gb},
            "pruner": self.pruner,
            "tokens": self.tokens,
            "of": self.of,
            "predicted": {
                "ms": self.expected.ms, "ms_most": self.expected.ms_most, "gb": self.expected.gb,
            },
            "level": self.asked.level,
            "why_not": self.why or None,
            "took": {"ms": took, "gb": gb},
            "off": {"ms": took / self.expected.ms - 1, "gb": gb / self.expected.gb - 1},
            "met": self.is_met(answer),
        }  # fmt: skip


def _off(took: float, expected: float) -> str:
    return f"{100 * abs(took / expected - 1):.1f} % off"


def choose(known: Calibration, wish: Wish, asked: Request, able: Iterable[int]) -> Choice:
    """The largest K that meets the wish, N first, then those below it that are `able`."""
    below = sorted(set(able), reverse=True)
    for K in (known.N, *below):
        expected = forecast(known, asked, K)
        if expected.meets(wish):
            return Choice(wish, asked, known.pruner, K, known.N, expected)
    whole, why = forecast(known, asked, known.N), _why(known, wish, asked, below[-1])
    return Choice(wish, asked, known.pruner, known.N, known.N, whole, why)


def _why(known: Calibration, wish: Wish, asked: Request, least: int) -> str:
    """Why pruning cannot help: what stays whatever K is, or what is left with the least K."""
    told, parts = forecast(known, asked, least), known.ms(least, asked.text, asked.images)
    start = f"pruning with {known.pruner} cannot meet {wish}, so nothing is pruned: "
    if wish.ms is not None and told.ms_most > wish.ms:
        behind = "" if known.in_tower else f"; {ELSE}"
        fixed = asked.image_ms + asked.level * parts["vision"]
        if not known.in_tower and fixed > wish.ms:
            return (
                f"{start}opening the image and the vision tower alone take {fixed:.0f} ms{behind}"
            )
        return f"{start}with {_tokens(least)} it takes up to {told.ms_most:.0f} ms{behind}"
    assert wish.gb is not None
    if asked.held / 1e9 > wish.gb:
        return f"{start}the weights alone take {asked.held / 1e9:.3f} GB"
    return f"{start}with {_tokens(least)} it takes {told.gb:.3f} GB"


def _tokens(K: int) -> str:
    return f"{K} visual token{'s' * (K != 1)}"
