"""Printed pages of 384 x 384 pixels, with more rows and smaller print.

Seven kinds of question, about held-out seeds. No file is read, so a source's path is ignored. A
response is right when it equals the answer, except for case, white space and a final full stop.
"""

from collections.abc import Iterator

from ...scenes.pages import KINDS, LARGE
from . import BadRecords, Question, Source
from .pages import LEAST_TOKENS, PER_KIND, read_pages, score

__all__ = ["KINDS", "LEAST_TOKENS", "PER_KIND", "read", "read_drawn", "score"]


def read(source: Source, bad: BadRecords) -> Iterator[Question]:
    """PER_KIND questions of each kind."""
    return read_drawn(PER_KIND)


def read_drawn(per_kind: int) -> Iterator[Question]:
    """`per_kind` questions of each of KINDS; a picture is drawn on demand."""
    return read_pages(per_kind, LARGE)
