"""LLaVA's prepared evaluation files (its `eval.zip`): one layout for all benchmarks.

The files of arXiv:2310.03744 are JSON lines of `question_id`, `image`, `text` and `category`.
`text` is all that is asked, with the suffix for short answers. The right answers are in the
benchmarks' own files, which LLaVA's guide puts beside: each format joins them. Where there are none
the questions have no answers, and only files of answers come of them.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...checkpoints.reading.paths import find_files
from . import BadRecords, Question, Source
from .records import (
    existing_file,
    existing_folder,
    id_field,
    image_file,
    numbered_lines,
    optional_field,
    parse_object,
    questions_from,
    text_field,
)
from .shared_rules import ONE_WORD

BEGINNING = "llava"
Annotate = Callable[[Question], Question]


def is_prepared(path: Path) -> bool:
    """Whether this is one of LLaVA's files, by its name."""
    return path.name.lower().startswith(BEGINNING) and not path.is_dir()


def read_prepared(
    source: Source, bad: BadRecords, images: str, annotate: Annotate
) -> Iterator[Question]:
    """The questions of a prepared file, each with what `annotate` adds to it.

    `images` is the images' folder in LLaVA's guide, relative to the file. `annotate` may raise
    RecordError.
    """
    path, folder = existing_file(source.path), prepared_images(source, images)
    seen: dict[str, int] = {}

    def questions(line: bytes) -> list[Question]:
        question = annotate(_bare_question(parse_object(line), folder))
        count = seen[question.id] = seen.get(question.id, 0) + 1
        name = question.id if count == 1 else f"{question.id}-{count}"  # some files repeat ids
        return [replace(question, id=name)]

    return questions_from(numbered_lines(path), questions, bad)


def prepared_images(source: Source, images: str) -> Path:
    """The images' folder: the source's, that of LLaVA's guide, or that of the file."""
    inside = source.path.parent / images
    return existing_folder(source.images or (inside if inside.is_dir() else source.path.parent))


def annotation_file(path: Path, *patterns: str) -> Path | None:
    """The first file that matches one of the patterns, relative to the folder of `path`."""
    files = (file for pattern in patterns for file in find_files(path.parent, pattern))
    return next(files, None)


def _bare_question(record: dict[str, Any], folder: Path) -> Question:
    category = optional_field(record, "category", "default")
    text_field(record, "text")  # it must be a text
    return Question(
        id=id_field(record, "question_id"),
        text=record["text"],
        answers=(),
        image=image_file(folder, text_field(record, "image")),
        kind="all" if category == "default" else category,
        record={"question_id": record["question_id"], "prompt": record["text"]},
    )


def without_suffix(text: str) -> str:
    """A prepared text without the line that asks for a short answer."""
    return text.strip().removesuffix(ONE_WORD).rstrip()
