"""Printed pages of 224 x 224 pixels drawn from held-out seeds, with seven kinds of question.

A receipt's total, a table's cell, a form's field, the highest or lowest of a chart, the number of
lines, whether a word is there, and where.

No file is read, so a source's path is ignored. A response is right when it equals the answer,
except for case, white space and a final full stop.
"""

from collections.abc import Iterator
from functools import partial

from ...scenes import HELD_OUT_SEEDS
from ...scenes.pages import KINDS, SMALL, PageSize, draw, page_questions
from . import BadRecords, DrawnPicture, Question, Source
from .shared_rules import exact_match as score

__all__ = ["KINDS", "PER_KIND", "read", "read_drawn", "score"]

PER_KIND = 100
LEAST_TOKENS = 0  # a response must equal the answer, so a sentence is of no use


def read(source: Source, bad: BadRecords) -> Iterator[Question]:
    """PER_KIND questions of each kind."""
    return read_drawn(PER_KIND)


def read_drawn(per_kind: int) -> Iterator[Question]:
    """`per_kind` questions of each of KINDS; a picture is drawn on demand."""
    return read_pages(per_kind, SMALL)


def read_pages(per_kind: int, page_size: PageSize) -> Iterator[Question]:
    """The questions about pages of a size."""
    for page, questions in page_questions(HELD_OUT_SEEDS, per_kind, page_size):
        image = DrawnPicture(f"page {page.seed}", partial(draw, page))
        for q in questions:
            yield Question(f"{page.seed}-{q.kind}", q.text, (q.answer,), image, q.kind)
