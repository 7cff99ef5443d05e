"""The answers of an evaluation so far, in a file beside its result, to resume from.

The file holds JSON lines, one for each batch, flushed to the disk before the next batch begins. A
line that was cut off, by a power failure or a full disk, is dropped.

Shapes: P methods with their budgets, B questions of a batch, I their images.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoints.reading.files import append_json, parse_json


@dataclass(frozen=True)
class AnsweredBatch:
    """A batch of questions with the answers of all methods. The field names are the file's keys.

    `questions_done` is how many questions of the set are done after this batch. `numbers` are
    those of its questions, without those in `skipped`. `refused` holds the methods that failed in
    this batch, as [number, reason]: they have no row from here on. `drafts` are the figures of
    `DraftFigures`, where a twig drafted.
    """

    questions_done: int
    numbers: list[int]
    responses: list[list[str]]  # (P, B)
    logprob: list[list[float]]  # (P, B): of the right answers
    loyal: list[list[bool]]  # (P, B): the same ids as the first method's
    seconds: float
    sizes: list[int]  # (I,): visual tokens of each image
    skipped: list[str] = field(default_factory=list)
    refused: list[tuple[int, str]] = field(default_factory=list)
    drafts: list[list[Any]] = field(default_factory=list)  # (P, 4)


class ResumeFile:
    """The batches of one evaluation. Its name depends on `settings`, so others have other files."""

    def __init__(self, result_path: Path, settings: Any):
        encoded = json.dumps(settings, sort_keys=True, default=str).encode()
        key = hashlib.sha256(encoded).hexdigest()[:8]
        self.path = result_path.with_name(f"{result_path.stem}.{key}.part.jsonl")

    def read(self) -> list[AnsweredBatch]:
        """The complete batches; the file is truncated after them."""
        batches: list[AnsweredBatch] = []
        if not self.path.exists():
            return batches
        complete_bytes = 0
        with self.path.open("rb") as file:
            for line in file:
                try:
                    batch = AnsweredBatch(**parse_json(line))
                except (ValueError, TypeError):
                    break
                if not line.endswith(b"\n"):
                    break
                batches.append(batch)
                complete_bytes += len(line)
        os.truncate(self.path, complete_bytes)
        return batches

    def append(self, batch: AnsweredBatch) -> None:
        """Write a batch through to the disk."""
        append_json(self.path, asdict(batch))

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
