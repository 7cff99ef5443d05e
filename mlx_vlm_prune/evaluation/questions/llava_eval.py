"""Any of LLaVA's prepared evaluation files (`--format llava-eval`), whatever its benchmark.

A file whose name tells a benchmark with a format here is read by that format, and scored if the
benchmark's own files lie beside. All others (VizWiz's `llava_test.jsonl`, SEED-Bench, LLaVA-Bench)
are asked as they stand and not scored: their files of answers are for the authors' scripts and
servers. Of VizWiz `upload` is what its server takes.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from ...checkpoints.errors import UserError
from . import BadRecords, Question, Source
from .prepared import read_prepared
from .vqa_normalise import normalise

LEAST_TOKENS = 128
VIZWIZ = "llava_test.jsonl"


def read(source: Source, bad: BadRecords) -> Iterator[Question]:
    """The questions of a file. Raises UserError where it or the images' folder is missing."""
    images = "test" if source.path.name == VIZWIZ else "images"
    return read_prepared(source, bad, images, lambda question: question)


def score(question: Question, response: str) -> float:
    """Never known. Raises UserError."""
    raise UserError("this file holds no right answers, so its responses have no score")


def upload(questions: list[Question], responses: list[str], source: Source) -> dict[str, bytes]:
    """VizWiz's JSON list of images with normalised answers; nothing for other files."""
    if source.path.name != VIZWIZ:
        return {}
    answers = [
        {"image": question.image.name, "answer": normalise(response)}
        for question, response in zip(questions, responses, strict=True)
        if isinstance(question.image, Path)
    ]
    return {".json": json.dumps(answers, ensure_ascii=False).encode()}
