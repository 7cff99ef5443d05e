"""Seven kinds of question about a page, each with one right answer.

A question is asked only where the page answers it without ambiguity: where a word stands only if
it is printed once, and wholly inside one of the 4 x 4 cells.
"""

from collections.abc import Iterator
from typing import TypeVar

import numpy as np

from ..draw import CELLS, GRID
from ..questions import Question
from .layouts import compose
from .page import LARGE, Page, PageSize, Text
from .words import LEXICON, PRINTED

# How often each kind is asked in training. Of a page as many different questions are asked as there
# is room for. Each has a dozen about its words and few about its facts, drawn more often therefore.
ODDS = {
    "total": 4, "cell": 12, "field": 8, "highest": 4, "lines": 2, "word": 1, "place": 4,
    "beside": 6,
}  # fmt: skip
KINDS = ("total", "cell", "field", "highest", "lines", "word", "place")
T = TypeVar("T")


def ask(page: Page, kind: str, rng: np.random.Generator) -> Question | None:
    """A question of one kind, or None where this page cannot answer one."""
    return _ASK[kind](page, rng)


def page_questions(
    seeds: range, per_kind: int, page_size: PageSize = LARGE
) -> Iterator[tuple[Page, list[Question]]]:
    """Pages with their questions, until each of KINDS was asked `per_kind` times."""
    left = dict.fromkeys(KINDS, per_kind)
    for seed in seeds:
        page, rng = compose(seed, page_size), np.random.default_rng([seed, 6])
        questions = [q for kind in KINDS if left[kind] and (q := ask(page, kind, rng))]
        for question in questions:
            left[question.kind] -= 1
        if questions:
            yield page, questions
        if not any(left.values()):
            return
    raise ValueError(f"{len(seeds)} seeds are too few for {per_kind} questions of each kind")


def _pick(rng: np.random.Generator, options: list[T]) -> T:
    return options[int(rng.integers(len(options)))]


def _total(page: Page, rng: np.random.Generator) -> Question | None:
    if page.facts.total is None:
        return None
    text = _pick(rng, ["What is the total?", "How much is it in total?"])
    return Question("total", text, str(page.facts.total))


def _cell(page: Page, rng: np.random.Generator) -> Question | None:
    if not page.facts.cells:
        return None
    row, column = _pick(rng, sorted(page.facts.cells))
    text = f"What is in row {row} and column {column}?"
    return Question("cell", text, str(page.facts.cells[row, column]))


def _field(page: Page, rng: np.random.Generator) -> Question | None:
    if not page.facts.fields:
        return None
    label = _pick(rng, sorted(page.facts.fields))
    return Question("field", f"What is the {label}?", page.facts.fields[label])


def _highest(page: Page, rng: np.random.Generator) -> Question | None:
    heights = page.facts.heights
    if not heights:
        return None
    extreme, choose = _pick(rng, [("highest", max), ("lowest", min)])
    text = f"Which {page.facts.chart} is {extreme}?"
    return Question("highest", text, choose(heights, key=heights.__getitem__))


def _lines(page: Page, rng: np.random.Generator) -> Question | None:
    if not page.facts.lines:
        return None
    counted = _pick(rng, sorted(page.facts.lines))
    return Question("lines", f"How many {counted}?", str(page.facts.lines[counted]))


def _word(page: Page, rng: np.random.Generator) -> Question:
    printed = {text.text.lower() for text in page.texts}
    is_there = bool(rng.random() < 0.5) and bool(printed & set(LEXICON))
    words = [word for word in LEXICON if (word in printed) == is_there]
    text = f"Is there the word {_pick(rng, words)}?"
    return Question("word", text, "yes" if is_there else "no")


def _place(page: Page, rng: np.random.Generator) -> Question | None:
    texts = [text.text.lower() for text in page.texts]
    places: list[tuple[Text, tuple[int, int]]] = [
        (text, cell)
        for text in page.texts
        if text.text.lower() in LEXICON and texts.count(text.text.lower()) == 1
        if (cell := page.cell_of(text))
    ]
    if not places:
        return None
    text, (column, row) = _pick(rng, places)
    return Question("place", f"Where is the word {text.text.lower()}?", CELLS[row * GRID + column])


def beside(page: Page, rng: np.random.Generator) -> Question | None:
    """What is printed right of a word or below it: asked in training only, it teaches how fields,
    totals and tables are read."""
    texts = [text.text.lower() for text in page.texts]
    words = [
        t for t in page.texts if t.text.lower() in PRINTED and texts.count(t.text.lower()) == 1
    ]
    if not words:
        return None
    word, side = _pick(rng, words), _pick(rng, ["right of", "below"])
    nearest = (_right_of if side == "right of" else _below)(page, word)
    answer = nearest.text.lower() if nearest else "nothing"
    return Question("beside", f"What is {side} {word.text.lower()}?", answer)


def _right_of(page: Page, word: Text) -> Text | None:
    """The next text of a line."""
    line = [t for t in page.texts if abs(t.y - word.y) < word.size / 2 and t.box[0] > word.box[0]]
    return min(line, key=lambda text: text.box[0], default=None)


def _below(page: Page, word: Text) -> Text | None:
    """The next text that lies below a part of a word, at most three lines away."""
    left, _, right, _ = word.box
    near = [t for t in page.texts if word.size / 2 < t.y - word.y < 3 * word.size]
    under = [text for text in near if text.box[0] < right and text.box[2] > left]
    return min(under, key=lambda text: (text.y, text.box[0]), default=None)


_ASK = {
    "total": _total,
    "cell": _cell,
    "field": _field,
    "highest": _highest,
    "lines": _lines,
    "word": _word,
    "place": _place,
    "beside": beside,
}
