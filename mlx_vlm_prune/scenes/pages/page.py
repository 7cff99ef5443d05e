"""What is on a printed page: texts and shapes at their places, and the facts they show.

Lengths are pixels, before the page is turned. No place depends on how
wide a font draws a word, so that the facts are the same with any version of Pillow.
"""

import math
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from ..draw import GRID

Length = TypeVar("Length", float, np.ndarray)

FONTS = ("Caladea-Regular", "DejaVuSansMono", "DejaVuSerif", "Roboto-Bold", "Roboto-Regular")
WIDEST, LONGEST = 0.89, 6.3  # a letter on average, and a word, in sizes of the font, at most


@dataclass(frozen=True)
class PageSize:
    """How large pages are and how they are printed; lengths in pixels."""

    side: int = 384  # both sides
    smallest: float = 9.0  # font
    bar_letters: int = 6  # of a bar's name, at most


LARGE = PageSize()
SMALL = PageSize(224, 11.0, 4)


@dataclass(frozen=True)
class Text:
    """A word or a number; x is its left end ("lm"), right end ("rm") or middle ("mm")."""

    text: str
    x: float
    y: float  # the middle of its height
    size: float  # of the font
    anchor: str = "lm"

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of what it covers at most."""
        width = width_of(self.text, self.size)
        left = self.x - width * {"l": 0.0, "m": 0.5, "r": 1.0}[self.anchor[0]]
        return left, self.y - 0.6 * self.size, left + width, self.y + 0.6 * self.size


@dataclass(frozen=True)
class Shape:
    """A line through points, or a filled polygon; colours are RGB, None the page's ink."""

    points: tuple[tuple[float, float], ...]
    width: float = 1.0
    fill: tuple[int, int, int] | None = None
    is_polygon: bool = False


@dataclass(frozen=True)
class Facts:
    """What the page says, as far as questions need it."""

    total: int | None = None
    cells: dict[tuple[str, str], int] = field(default_factory=dict)  # by names of row and column
    fields: dict[str, str] = field(default_factory=dict)  # of a form, by label
    heights: dict[str, float] = field(default_factory=dict)  # of bars or points, by name
    chart: str = ""  # "bar" or "month": what these are
    lines: dict[str, int] = field(default_factory=dict)  # how many, by what is counted


@dataclass(frozen=True)
class Page:
    """The page of one seed."""

    seed: int
    layout: str
    font: str
    paper: tuple[int, int, int]
    ink: tuple[int, int, int]
    turn: float  # degrees, anticlockwise
    noise: float  # grey levels, standard deviation
    texts: tuple[Text, ...]
    shapes: tuple[Shape, ...]
    facts: Facts
    side: int = LARGE.side  # pixels

    def turned(self, x: Length, y: Length) -> tuple[Length, Length]:
        """Where points of the straight page lie in the picture."""
        angle, middle = math.radians(self.turn), self.side / 2
        right, down = x - middle, y - middle
        return (
            middle + math.cos(angle) * right + math.sin(angle) * down,
            middle - math.sin(angle) * right + math.cos(angle) * down,
        )

    def cell_of(self, text: Text) -> tuple[int, int] | None:
        """Column and row of the cell that a text lies in wholly; None where it lies in several."""
        left, top, right, bottom = text.box
        corners = [self.turned(x, y) for x in (left, right) for y in (top, bottom)]
        cell = self.side // GRID
        cells = {(math.floor(x / cell), math.floor(y / cell)) for x, y in corners}
        return cells.pop() if len(cells) == 1 else None


def width_of(text: str, size: float) -> float:
    """Pixels that a word takes at most."""
    return min(WIDEST * len(text), LONGEST) * size
