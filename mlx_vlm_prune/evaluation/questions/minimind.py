"""MiniMind-V's parquet files: `conversations` (a JSON text) and `image_bytes` in every row.

A conversation is a list of {"role": "user" or "assistant", "content": …}; `image_bytes` are an
image file's bytes, or a list with them. Rows whose conversation has no `<image>` hold a
placeholder picture and are left out. A row with several images is an error. Everything else, the
scoring rule too, is as in llava.py.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from . import BadRecords, Question, Source
from .llava import IMAGE_MARK, question_answer_pairs, turn_questions
from .parquet import open_parquet, parquet_rows
from .records import NO_QUESTIONS, RecordError, existing_file, parse_value, questions_from
from .shared_rules import exact_match as score

__all__ = ["read", "score"]

COLUMNS = ("conversations", "image_bytes")


def read(source: Source, bad: BadRecords) -> Iterator[Question]:
    """The questions of a parquet file. Raises UserError where it cannot be read."""
    path = existing_file(source.path)
    rows = parquet_rows(open_parquet(path, COLUMNS), path, COLUMNS)
    return questions_from(rows, _questions, bad)


def _questions(record: tuple[int, dict[str, Any]]) -> Iterable[Question]:
    number, row = record
    conversation = row["conversations"]
    if not isinstance(conversation, str):
        raise RecordError("conversations is not a text")
    if IMAGE_MARK not in conversation:
        return NO_QUESTIONS
    image = _image(row["image_bytes"])
    turns = parse_value(conversation)
    pairs = question_answer_pairs(turns, "role", "content", ("user", "assistant"))
    return turn_questions(f"{number}", pairs, image)


def _image(content: Any) -> bytes:
    if isinstance(content, list):
        if len(content) != 1:
            raise RecordError(f"there are {len(content)} images; a question is about one")
        content = content[0]
    if not isinstance(content, bytes) or not content:
        raise RecordError("image_bytes hold no image")
    return content
