"""Parquet files, row by row. pyarrow is imported when the first is read: nothing else needs it."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ...checkpoints.errors import UserError, missing_package, reason

ROWS_AT_ONCE = 64  # held in memory


def open_parquet(path: Path, columns: Sequence[str], streamed: bool = False) -> Any:
    """The file; with `streamed`, row groups are not held whole. UserError if it cannot be read."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise missing_package("pyarrow", "reading parquet") from None
    try:
        buffers = {"buffer_size": 1 << 20, "pre_buffer": False} if streamed else {}
        file = ParquetFile(path, **buffers)
    except (ArrowException, OSError) as e:
        raise UserError(f"{path} is not a readable parquet file ({reason(e)})") from None
    missing = [name for name in columns if name not in file.schema_arrow.names]
    if missing:
        raise UserError(f"{path} has no column {missing[0]}; it needs {' and '.join(columns)}")
    return file


def parquet_rows(
    file: Any, path: Path, columns: Sequence[str]
) -> Iterator[tuple[str, tuple[int, dict[str, Any]]]]:
    """The rows of an opened file: each one's place in words, its number from 1, and its cells."""
    from pyarrow import ArrowException

    number = 0
    try:
        for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=list(columns)):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", (number, row)
    except (ArrowException, OSError, ValueError) as e:
        raise UserError(f"{path} is damaged after row {number} ({reason(e)})") from None
