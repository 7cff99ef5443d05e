"""Questions of one's own: a file of JSON lines, or a folder with `questions.jsonl`.

A line holds `image` (a path, relative to the images' folder or else to the file), `question`
and `answer` (a text, or a list of texts that are all right), and may hold `kind` and `id`:

    {"image": "a.png", "question": "What colour is the star?", "answer": ["grey", "gray"]}

An answer is right when it is one of them, but for case, white space and a final full stop.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import Bad, Question, Source
from .answers import exact as score
from .reading import (
    each,
    existing,
    image_file,
    images_of,
    lines,
    optional,
    parse,
    text_of,
    texts_of,
)

__all__ = ["read", "score"]


def read(source: Source, bad: Bad) -> Iterator[Question]:
    """The questions of a file or folder. Raises UserError where either is missing."""
    inside = source.path / "questions.jsonl"
    path = existing(inside if source.path.is_dir() else source.path)
    home = images_of(Source(path, source.images))
    numbered = ((where, (n, raw)) for n, (where, raw) in enumerate(lines(path), 1))
    return each(numbered, lambda record: [_question(*record, home)], bad)


def _question(number: int, raw: bytes, home: Path) -> Question:
    record: dict[str, Any] = parse(raw)
    many = isinstance(record.get("answer"), list)
    answers = texts_of(record, "answer") if many else [text_of(record, "answer")]
    return Question(
        id=optional(record, "id", f"{number}"),
        text=text_of(record, "question"),
        answers=tuple(answers),
        image=image_file(home, text_of(record, "image")),
        kind=optional(record, "kind", "all"),
    )
