"""MiniMind-V's parquet files: `conversations` (a JSON text) and `image_bytes` in every row.

A conversation is a list of {"role": "user" or "assistant", "content": …}; `image_bytes` are an
image file's bytes, or a list with them. Rows whose conversation has no `<image>` hold a
placeholder picture and are left out; rows with several images are at fault. Everything else,
the rule of judging too, is as in llava.py.

pyarrow is imported when the first file is read: nothing else needs it.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ...checkpoints.errors import UserError, lacks, reason
from . import Bad, Question, Source
from .answers import exact as score
from .llava import MARK, pairs, questions
from .reading import NOTHING, Fault, each, existing, parse_any

__all__ = ["read", "score"]

COLUMNS = ("conversations", "image_bytes")
ROWS = 64  # that lie in memory at a time


def read(source: Source, bad: Bad) -> Iterator[Question]:
    """The questions of a parquet file. Raises UserError where it cannot be read."""
    return each(_rows(_open(existing(source.path)), source.path), _questions, bad)


def _open(path: Path) -> Any:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise lacks("pyarrow", "reading parquet") from None
    try:
        file = ParquetFile(path)
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
        for batch in file.iter_batches(batch_size=ROWS, columns=list(COLUMNS)):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", (number, row)
    except (ArrowException, OSError, ValueError) as e:
        raise UserError(f"{path} is damaged after row {number} ({reason(e)})") from None


def _questions(record: tuple[int, dict[str, Any]]) -> Iterable[Question]:
    number, row = record
    told = row["conversations"]
    if not isinstance(told, str):
        raise Fault("conversations is not a text")
    if MARK not in told:
        return NOTHING
    image = _image(row["image_bytes"])
    asked = pairs(parse_any(told), "role", "content", ("user", "assistant"))
    return questions(f"{number}", asked, image)


def _image(held: Any) -> bytes:
    if isinstance(held, list):
        if len(held) != 1:
            raise Fault(f"there are {len(held)} images; a question is about one")
        held = held[0]
    if not isinstance(held, bytes) or not held:
        raise Fault("image_bytes hold no image")
    return held
