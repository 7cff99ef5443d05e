"""The built-in question set: scenes drawn from held-out seeds, with six kinds of question each.

No file is read, so a source's path is ignored. A response is right when it equals the answer,
except for case, white space and a final full stop.
"""

from collections.abc import Iterator
from functools import partial

from ...scenes import HELD_OUT_SEEDS, KINDS, SMALL, Canvas, draw, question_set
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
    return read_canvas(per_kind, SMALL)


def read_canvas(per_kind: int, canvas: Canvas) -> Iterator[Question]:
    """The questions about scenes on a canvas."""
    for scene, questions in question_set(HELD_OUT_SEEDS, per_kind, canvas):
        image = DrawnPicture(f"scene {scene.seed}", partial(draw, scene))
        for q in questions:
            yield Question(f"{scene.seed}-{q.kind}", q.text, (q.answer,), image, q.kind)
