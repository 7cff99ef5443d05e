"""MiniMind-V's parquet files: `conversations` (a JSON text) and `image_bytes` in every row.

A conversation is a list of {"role": "user" or "assistant", "content": …}; `image_bytes` are an
image file's bytes, or a list with them. Rows whose conversation has no `<image>` hold a
placeholder picture and are left out. A row with several images is an error. Everything else, the
scoring rule too, is as in llava.py.

pyarrow is imported when the first file is read: nothing else needs it.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ...checkpoints.errors import UserError, missing_package, reason
from . import BadRecords, Question, Source
from .llava import IMAGE_MARK, question_answer_pairs, turn_questions
from .records import NO_QUESTIONS, RecordError, existing_file, parse_value, questions_from
from .shared_rules import exact_match as score

__all__ = ["open_parquet", "read", "score"]

COLUMNS = ("conversations", "image_bytes")
ROWS_AT_ONCE = 64  # held in memory


def read(source: Source, bad: BadRecords) -> Iterator[Question]:
    """The questions of a parquet file. Raises UserError where it cannot be read."""
    return questions_from(
        _rows(open_parquet(existing_file(source.path)), source.path), _questions, bad
    )


def open_parquet(path: Path, streamed: bool = False) -> Any:
    """The file; with `streamed`, row groups are not held whole. UserError if it cannot be read."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise missing_package("pyarrow", "reading parquet") from None
    try:
        how = {"buffer_size": 1 << 20, "pre_buffer": False} if streamed else {}
        file = ParquetFile(path, **how)
    except (ArrowException, OSError) as e:
        raise UserError(f"{path} is not a readable parquet file ({reason(e)})") from None
    missing = [name for name in COLUMNS if name not in file.schema_arrow.names]
    if missing:
        raise UserError(f"{path} has no column {missing[0]}; it needs {' and '.join(COLUMNS)}")
    return file


def _rows(file: Any, path: Path) -> Iterator[tuple[str, tuple[int, dict[str, Any]]]]:
    from pyarrow import ArrowException

    number = 0
    try:
        for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=list(COLUMNS)):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", (number, row)
    except (ArrowException, OSError, ValueError) as e:
        raise UserError(f"{path} is damaged after row {number} ({reason(e)})") from None


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
