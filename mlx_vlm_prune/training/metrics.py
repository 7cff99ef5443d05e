"""metrics.jsonl: a line for every report of a run, each once, however often it was resumed."""

import json
from pathlib import Path
from typing import Any

from ..checkpoints.errors import UserError
from ..checkpoints.reading.files import append_json, parse_json, write_atomically

FILE = "metrics.jsonl"
Row = dict[str, Any]


class Metrics:
    """The lines of a run up to a step."""

    def __init__(self, folder: Path, iteration: int):
        """Drop what was written behind `iteration`, from which the run goes on."""
        self.path = folder / FILE
        self.rows = [row for row in read_rows(self.path) if row["iteration"] <= iteration]
        if self.path.exists():
            write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def append(self, row: Row) -> None:
        """Through to the disk. Raises UserError."""
        append_json(self.path, row)
        self.rows.append(row)

    @property
    def evaluated(self) -> set[int]:
        """The steps behind which the held-out examples were read."""
        return {row["iteration"] for row in self.rows if "val_loss" in row}

    def column(self, name: str) -> tuple[list[int], list[float]]:
        """The steps at which a figure was reported, and the figure."""
        pairs = [(row["iteration"], row[name]) for row in self.rows if name in row]
        return [step for step, _ in pairs], [value for _, value in pairs]


def read_rows(path: Path) -> list[Row]:
    """The whole lines of the file; none where it is not there. Raises UserError."""
    try:
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror or e}") from None
    rows = []
    for line in lines:
        try:
            row = parse_json(line)
        except ValueError:
            break  # a power failure or a full disk cut it off
        if not line.endswith(b"\n") or not isinstance(row, dict) or "iteration" not in row:
            break
        rows.append(row)
    return rows
