"""Any of LLaVA's prepared evaluation files (`--format llava-eval`), whatever its benchmark.

A file whose name tells a benchmark with a format here is read by that format, and scored if the
benchmark's own files lie beside. All others (VizWiz's `llava_test.jsonl`, SEED-Bench, LLaVA-Bench)
are asked as they stand and not scored: their files of answers are for the authors' scripts and
servers.
"""

from collections.abc import Iterator

from ...checkpoints.errors import UserError
from . import BadRecords, Question, Source
from .prepared import read_prepared

LEAST_TOKENS = 128
IMAGES = "images"


def read(source: Source, bad: BadRecords) -> Iterator[Question]:
    """The questions of a file. Raises UserError where it or the images' folder is missing."""
    return read_prepared(source, bad, IMAGES, lambda question: question)


def score(question: Question, response: str) -> float:
    """Never known. Raises UserError."""
    raise UserError("this file holds no right answers, so its responses have no score")
