"""The built-in set: pictures drawn from held-out seeds, six kinds of question about them.

Nothing is read, so a source's path means nothing here. An answer is right when it is the one
right answer, but for case, white space and a final full stop.
"""

from collections.abc import Iterator
from functools import partial

from ...scenes import HELD_OUT_SEEDS, KINDS, draw, question_set
from . import Bad, Question, Source
from .answers import exact as score

__all__ = ["KINDS", "PER_KIND", "read", "read_scenes", "score"]

PER_KIND = 100


def read(source: Source, bad: Bad) -> Iterator[Question]:
    """PER_KIND questions of each kind."""
    return read_scenes(PER_KIND)


def read_scenes(per_kind: int) -> Iterator[Question]:
    """So many questions of each of KINDS; a picture is drawn when it is called for."""
    for scene, asked in question_set(HELD_OUT_SEEDS, per_kind):
        image = partial(draw, scene)
        for q in asked:
            yield Question(f"{scene.seed}-{q.kind}", q.text, (q.answer,), image, q.kind)
