"""The built-in question set: scenes drawn from held-out seeds, with six kinds of question each.

No file is read, so a source's path is ignored. A response is right when it equals the answer,
except for case, white space and a final full stop.
"""

from collections.abc import Iterator
from functools import partial

from ...scenes import HELD_OUT_SEEDS, KINDS, draw, question_set
from . import BadRecords, Question, Source
from .shared_rules import exact_match as score

__all__ = ["KINDS", "PER_KIND", "read", "read_scenes", "score"]

PER_KIND = 100
LEAST_TOKENS = 0  # a response must equal the answer, so a sentence is of no use


def read(source: Source, bad: BadRecords) -> Iterator[Question]:
    """PER_KIND questions of each kind."""
    return read_scenes(PER_KIND)


def read_scenes(per_kind: int) -> Iterator[Question]:
    """`per_kind` questions of each of KINDS; a picture is drawn on demand."""
    for scene, questions in question_set(HELD_OUT_SEEDS, per_kind):
        image = partial(draw, scene)
        for q in questions:
            yield Question(f"{scene.seed}-{q.kind}", q.text, (q.answer,), image, q.kind)
