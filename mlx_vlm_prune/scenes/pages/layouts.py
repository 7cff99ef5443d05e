"""Six kinds of pages: receipt, table, form, bar chart, line chart, text in two columns.

Each function here puts texts and shapes on a sheet and returns the facts that they show.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from .page import FONTS, LARGE, WIDEST, Facts, Page, PageSize, Shape, Text, width_of
from .words import ANIMALS, CITIES, FOOD, LABELS, LEXICON, MONTHS, NAMES, SHORT, TOTAL

MARGIN = 14.0
LARGEST = 20.0  # font, in pixels
STEEPEST = 2.0  # degrees that a page is turned
COLOURS = ((70, 110, 180), (200, 110, 60), (90, 150, 90), (150, 90, 150), (120, 120, 120))
CLEARLY = 8  # by how much the highest and the lowest of a chart differ from the next, of 100


@dataclass
class Sheet:
    """A page while it is composed."""

    rng: np.random.Generator
    page_size: PageSize = LARGE
    texts: list[Text] = field(default_factory=list)
    shapes: list[Shape] = field(default_factory=list)

    @property
    def room(self) -> float:
        """Pixels between the margins, less what turning the page may take."""
        return self.page_size.side - 2 * MARGIN - 6

    def between(self, low: float, high: float) -> float:
        """A number in a range."""
        return float(self.rng.uniform(low, max(low, high)))

    def count(self, low: int, high: int) -> int:
        """A whole number, both ends included."""
        return int(self.rng.integers(low, high + 1))

    def pick(self, words: Sequence[str], count: int) -> list[str]:
        """Different words."""
        return [str(word) for word in self.rng.choice(list(words), count, replace=False)]

    def font_size(self, *most: float) -> float:
        """A size that all limits allow; small ones are as likely as large ones."""
        return self.between(self.page_size.smallest, min(LARGEST, *most))

    def place(self, width: float, height: float) -> tuple[float, float]:
        """Left and top of a block on the page."""
        end = self.page_size.side - MARGIN
        return self.between(MARGIN, end - width), self.between(MARGIN, end - height)

    def chart_height(self) -> float:
        """Pixels from a chart's ground to its top."""
        return self.between(110 / 384 * self.page_size.side, self.page_size.side - 94)

    def write(self, text: str, x: float, y: float, size: float, anchor: str = "lm") -> None:
        self.texts.append(Text(text, x, y, size, anchor))

    def rule(self, *points: tuple[float, float], width: float = 1.0) -> None:
        """A line in the page's ink."""
        self.shapes.append(Shape(points, width))


def receipt(sheet: Sheet) -> Facts:
    """Names and prices, and their total."""
    tall = sheet.room - 10
    items = sheet.count(3, min(9, int(tall / (1.6 * sheet.page_size.smallest)) - 3))
    size = sheet.font_size(tall / (1.6 * (items + 3)), sheet.room / 11)
    step, width = 1.6 * size, sheet.between(11 * size, min(sheet.room, 17 * size))
    left, top = sheet.place(width, step * (items + 3))
    shop, *names = sheet.pick(LEXICON, items + 1)
    prices = [sheet.count(1, 99) for _ in names]
    sheet.write(shop, left + width / 2, top + step / 2, 1.3 * size, "mm")
    for row, (name, price) in enumerate(zip(names, prices, strict=True)):
        y = top + step * (row + 1.7)
        sheet.write(name, left, y, size)
        sheet.write(str(price), left + width, y, size, "rm")
    y = top + step * (items + 1.4)
    sheet.rule((left, y), (left + width, y))
    sheet.write(TOTAL, left, y + 0.8 * step, size)
    sheet.write(str(sum(prices)), left + width, y + 0.8 * step, size, "rm")
    return Facts(total=sum(prices), lines={"items are on the receipt": items})


def table(sheet: Sheet) -> Facts:
    """Numbers by the names of rows and columns."""
    wide, smallest = sheet.room + 5, sheet.page_size.smallest
    rows, columns = sheet.count(3, 7), sheet.count(2, min(4, int((wide / smallest - 6.8) / 4.6)))
    size = sheet.font_size(wide / (6.8 + 4.6 * columns), (sheet.room - 10) / (1.8 * (rows + 1)))
    first, pitch, step = 6.8 * size, 4.6 * size, 1.8 * size
    width = first + pitch * columns
    left, top = sheet.place(width, step * (rows + 1))
    heads = sheet.pick(MONTHS if sheet.rng.random() < 0.5 else SHORT, columns)
    names = sheet.pick([word for word in LEXICON if word not in heads], rows)
    cells = {}
    for column, head in enumerate(heads):
        sheet.write(head, left + first + pitch * (column + 1), top + step / 2, size, "rm")
    for row, name in enumerate(names):
        y = top + step * (row + 1.5)
        sheet.write(name, left + 0.3 * size, y, size)
        for column, head in enumerate(heads):
            cells[name, head] = number = sheet.count(1, 99)
            sheet.write(str(number), left + first + pitch * (column + 1), y, size, "rm")
    _rule_table(sheet, left, top, first, pitch, step, (rows, columns))
    return Facts(cells=cells)


def _rule_table(
    sheet: Sheet,
    left: float,
    top: float,
    first: float,
    pitch: float,
    step: float,
    shape: tuple[int, int],
) -> None:
    """No lines but the header's, lines between rows, or a grid."""
    (rows, columns), ruling = shape, sheet.count(0, 2)
    right = left + first + pitch * columns + 4
    for row in range(rows + 2) if ruling else (1,):
        sheet.rule((left, top + step * row), (right, top + step * row))
    if ruling == 2:
        inner = [left + first + pitch * column + 4 for column in range(columns + 1)]
        for x in (left, *inner):
            sheet.rule((x, top), (x, top + step * (rows + 1)))


def form(sheet: Sheet) -> Facts:
    """Labels, and what was filled in."""
    labels = sheet.pick(LABELS, sheet.count(3, len(LABELS)))
    size = sheet.font_size(sheet.room / (2.2 * len(labels)), sheet.room / 14)
    step, gap = 2.2 * size, width_of("animal", size) + size
    width = gap + 8 * size
    left, top = sheet.place(width, step * len(labels))
    words = {"name": NAMES, "city": CITIES, "animal": ANIMALS, "food": FOOD}
    fields, boxed = {}, sheet.rng.random() < 0.5
    for row, label in enumerate(labels):
        y = top + step * (row + 0.5)
        value = sheet.pick(words[label], 1)[0] if label in words else str(sheet.count(1, 99))
        fields[label] = value
        sheet.write(label, left, y, size)
        sheet.write(value, left + gap + 0.4 * size, y, size)
        low, high, end = y + 0.8 * size, y - 0.8 * size, left + width
        corners = ((left + gap, low), (left + gap, high), (end, high), (end, low))
        sheet.rule(*((*corners, corners[0]) if boxed else (corners[0], corners[3])))
    return Facts(fields=fields)


def bars(sheet: Sheet) -> Facts:
    """A bar chart."""
    letters, smallest = sheet.page_size.bar_letters, sheet.page_size.smallest
    ems = WIDEST * letters + 0.06  # from bar to bar, in sizes of the font
    count = sheet.count(3, min(7, int(sheet.room / (ems * smallest))))
    names = sheet.pick([word for word in LEXICON if len(word) <= letters], count)
    size = sheet.font_size(sheet.room / (ems * count), 14)
    pitch, tall = ems * size, sheet.chart_height()
    left, top = sheet.place(pitch * count, tall + 2 * size)
    heights, ground = _heights(sheet, count), top + tall
    several = sheet.rng.random() < 0.5
    colours = sheet.rng.integers(len(COLOURS), size=count if several else 1)
    thick = sheet.between(0.25, 0.4) * pitch
    for i, (name, height) in enumerate(zip(names, heights, strict=True)):
        x, high = left + pitch * (i + 0.5), ground - tall * height / 100
        corners = ((x - thick, ground), (x - thick, high), (x + thick, high), (x + thick, ground))
        sheet.shapes.append(
            Shape(corners, fill=COLOURS[colours[i % len(colours)]], is_polygon=True)
        )
        sheet.write(name, x, ground + 1.1 * size, size, "mm")
    sheet.rule((left, top), (left, ground), (left + pitch * count, ground), width=1.5)
    return Facts(heights=dict(zip(names, heights, strict=True)), chart="bar")


def curve(sheet: Sheet) -> Facts:
    """A line chart over some months."""
    count = sheet.count(4, min(8, int(sheet.room / (3 * sheet.page_size.smallest))))
    begin = sheet.count(0, len(MONTHS) - count)
    names = MONTHS[begin : begin + count]
    size = sheet.font_size(sheet.room / (3 * count), 14)
    pitch, tall = sheet.between(3 * size, sheet.room / count), sheet.chart_height()
    left, top = sheet.place(pitch * count, tall + 2 * size)
    heights, ground = _heights(sheet, count), top + tall
    points = []
    for i, (name, height) in enumerate(zip(names, heights, strict=True)):
        x, y = left + pitch * (i + 0.5), ground - tall * height / 100
        points.append((x, y))
        dot = ((x - 2, y - 2), (x + 2, y - 2), (x + 2, y + 2), (x - 2, y + 2))
        sheet.shapes.append(Shape(dot, is_polygon=True))
        sheet.write(name, x, ground + 1.1 * size, size, "mm")
    colour = COLOURS[sheet.count(0, len(COLOURS) - 1)]
    sheet.shapes.insert(0, Shape(tuple(points), 2.0, colour))
    sheet.rule((left, top), (left, ground), (left + pitch * count, ground), width=1.5)
    return Facts(heights=dict(zip(names, heights, strict=True)), chart="month")


def _heights(sheet: Sheet, count: int) -> list[float]:
    """Heights of 100, of which the highest and the lowest stand out."""
    inner = [sheet.between(20 + CLEARLY, 90 - CLEARLY) for _ in range(count - 2)]
    ends = [sheet.between(8, 20), sheet.between(90, 100)]
    return [float(height) for height in sheet.rng.permutation([*inner, *ends])]


def columns(sheet: Sheet) -> Facts:
    """Text in two columns."""
    size = sheet.font_size(14)
    side = sheet.page_size.side
    step, width = 1.6 * size, (side - 3 * MARGIN) / 2
    top, most = sheet.between(MARGIN, 60), int((side - 60 - MARGIN) / step)
    words, lines = iter(sheet.pick(LEXICON, len(LEXICON))), {}
    for name, left in (("left", MARGIN), ("right", 2 * MARGIN + width)):
        lines[f"lines are in the {name} column"] = count = sheet.count(3, min(most, 12))
        for row in range(count):
            x = left
            for word in words:
                if x > left and x + width_of(word, size) > left + width:
                    break
                sheet.write(word, x, top + step * (row + 0.5), size)
                x += width_of(word, size) + 0.3 * size
    return Facts(lines=lines)


LAYOUTS: dict[str, Callable[[Sheet], Facts]] = {
    "receipt": receipt,
    "table": table,
    "form": form,
    "bars": bars,
    "curve": curve,
    "columns": columns,
}


def compose(seed: int, page_size: PageSize = LARGE) -> Page:
    """The page of a seed."""
    rng = np.random.default_rng([seed, 4])
    layout = str(rng.choice(list(LAYOUTS)))
    font = str(rng.choice(FONTS))
    paper = rng.integers(225, 256) - rng.integers(0, 14, 3)
    ink = np.clip(rng.integers(0, 70) + rng.integers(-15, 16, 3), 0, 255)
    turn = float(rng.uniform(-STEEPEST, STEEPEST)) if rng.random() < 0.7 else 0.0
    noise = float(rng.uniform(0, 6))
    sheet = Sheet(rng, page_size)
    facts = LAYOUTS[layout](sheet)
    style = str(rng.choice(["lower", "title", "upper"], p=[0.5, 0.3, 0.2]))
    texts = tuple(replace(text, text=getattr(text.text, style)()) for text in sheet.texts)
    red, green, blue = (int(level) for level in paper)
    dark = tuple(int(level) for level in ink)
    return Page(
        seed, layout, font, (red, green, blue), (dark[0], dark[1], dark[2]), turn, noise, texts,
        tuple(sheet.shapes), facts, page_size.side,
    )  # fmt: skip
