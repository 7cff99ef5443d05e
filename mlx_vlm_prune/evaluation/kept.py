"""What an evaluation reached, kept beside its result until that is written.

A file of JSON lines, one a batch, each written through before the next batch begins. A line that
was cut off, by a power failure or a full disk, counts as not reached.

Shapes: P methods with their budgets, B questions of a batch.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoints.reading.files import append_json, parse_json


@dataclass(frozen=True)
class Answered:
    """A batch of questions, answered by all methods.

    `upto` questions of the set are done with it; `asked` says which of them it holds, since
    `skipped` ones are not among them. `refused` names, in the first batch, the methods that
    cannot do, as [number, reason]; they have no rows.
    """

    upto: int
    asked: list[int]
    said: list[list[str]]  # (P, B)
    logprob: list[list[float]]  # (P, B)
    loyal: list[list[bool]]  # (P, B): the same ids as the first method's
    seconds: float
    sizes: list[int]  # (B,): visual tokens of each question's image
    skipped: list[str] = field(default_factory=list)
    refused: list[tuple[int, str]] = field(default_factory=list)


class Kept:
    """The file of one evaluation; another one, by whatever it differs, has another file."""

    def __init__(self, out: Path, told: Any):
        told_bytes = json.dumps(told, sort_keys=True, default=str).encode()
        key = hashlib.sha256(told_bytes).hexdigest()[:8]
        self.path = out.with_name(f"{out.stem}.{key}.part.jsonl")

    def read(self) -> list[Answered]:
        """The batches reached so far; what was cut off is cut off for good."""
        found: list[Answered] = []
        if not self.path.exists():
            return found
        whole = 0
        with self.path.open("rb") as file:
            for line in file:
                try:
                    batch = Answered(**parse_json(line))
                except (ValueError, TypeError):
                    break
                if not line.endswith(b"\n"):
                    break
                found.append(batch)
                whole += len(line)
        os.truncate(self.path, whole)
        return found

    def add(self, batch: Answered) -> None:
        """Write a batch through to the disk."""
        append_json(self.path, asdict(batch))

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
