"""MiniMind-V's parquet files, `pretrain_i2t` and `sft_i2t`: a conversation and images in every row.

`conversations` is a JSON text, `image_bytes` an image file's bytes or a list of them. Rows whose
conversation has no `<image>` hold a placeholder picture, and become text alone.

A parquet file is read by row groups. A small one is a block; a large one, perhaps the whole file,
is read through, several blocks one after another. Some blocks are held, never the file.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ...checkpoints.errors import UserError, reason
from ...evaluation.questions.minimind import COLUMNS
from ...evaluation.questions.parquet import open_parquet
from ...evaluation.questions.records import RecordError, existing_file, parse_value
from ...inputs.prompt import IMAGE_MARK
from ..examples import Example
from .records import conversation

BLOCK_BYTES = 1 << 22
HELD_BLOCKS = 34  # two windows of an order (batches.py), and one more for a batch between them


class ParquetRows:
    """Rows by their number. `blocks` are ranges of them, by row group."""

    def __init__(self, path: Path):
        self.path, self.file = path, open_parquet(path, COLUMNS, streamed=True)
        self.blocks = _blocks(self.file.metadata)
        flat = [(group, rows) for group, blocks in enumerate(self.blocks) for rows in blocks]
        self.groups, self.ranges = [group for group, _ in flat], [rows for _, rows in flat]
        self.starts = np.array([rows.start for rows in self.ranges], np.int64)
        self.held: OrderedDict[int, Any] = OrderedDict()  # record batches by their block
        self.reader: Iterator[Any] = iter(())  # goes through a row group
        self.next_block = -1  # what `reader` reads next; -1 where it is at an end
        self.lock = threading.Lock()

    def __len__(self) -> int:
        return int(self.file.metadata.num_rows)

    def __getitem__(self, index: int) -> Example:
        where = f"{self.path}, row {index + 1}"
        try:
            row = self._row(index)
            text, images = row["conversations"], row["image_bytes"]
            turns = parse_value(text) if isinstance(text, str) else text
            return conversation(turns, _images(images) if IMAGE_MARK in str(text) else (), where)
        except RecordError as e:
            raise UserError(f"{where}: {e}") from None

    def _row(self, index: int) -> dict[str, Any]:
        block = int(np.searchsorted(self.starts, index, side="right")) - 1
        with self.lock:
            if block not in self.held:
                self._read_to(block)
            self.held.move_to_end(block)
            rows = self.held[block]
        return dict(rows.slice(index - self.ranges[block].start, 1).to_pylist()[0])

    def _read_to(self, block: int) -> None:
        """Hold a block. In a row group that is being read already, those ahead of it are, too."""
        group = self.groups[block]
        if not (0 <= self.next_block <= block and self.groups[self.next_block] == group):
            self.next_block = self.groups.index(group)
            self.reader = self.file.iter_batches(
                len(self.ranges[self.next_block]), [group], list(COLUMNS)
            )
        try:
            while self.next_block <= block:
                rows = next(self.reader)
                if len(rows) != len(self.ranges[self.next_block]):
                    raise ValueError("rows are missing")
                self.held[self.next_block] = rows
                self.next_block += 1
                while len(self.held) > HELD_BLOCKS:
                    self.held.popitem(last=False)
            if self.groups[block + 1 : block + 2] != [group]:
                self.next_block = -1
        except (OSError, ValueError, NotImplementedError, StopIteration) as e:
            rows, self.next_block = self.ranges[self.next_block], -1
            raise UserError(
                f"{self.path} is damaged in rows {rows.start + 1} to {rows.stop} ({reason(e)})"
            ) from None


def open_dataset(path: Path, images: Path | None) -> ParquetRows:
    """The rows of a file, which holds its own images. Raises UserError where it cannot be read."""
    if images is not None:
        raise UserError(f"{path} holds its own images; leave out image_folder")
    return ParquetRows(existing_file(path))


def _blocks(metadata: Any) -> list[list[range]]:
    """The rows of every row group in ranges of a few megabytes."""
    blocks, first = [], 0
    for n in range(metadata.num_row_groups):
        group = metadata.row_group(n)
        rows = range(first, first + group.num_rows)
        step = max(1, min(len(rows), BLOCK_BYTES * len(rows) // max(1, group.total_byte_size)))
        blocks.append([rows[i : i + step] for i in range(0, len(rows), step)])
        first = rows.stop
    return blocks


def _images(content: Any) -> list[bytes]:
    images = content if isinstance(content, list) else [content]
    if not images or not all(isinstance(image, bytes) and image for image in images):
        raise RecordError("image_bytes hold no image")
    return images
