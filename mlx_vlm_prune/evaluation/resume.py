"""What a run has done so far, in a file beside its result, to resume from.

The file holds JSON lines, one for each batch of an evaluation or each round of a sweep, flushed to
the disk before the next begins. A line that was cut off, by a power failure or a full disk, is
dropped.

Shapes: P methods with their budgets, B questions of a batch, I their images.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from ..checkpoints.reading.files import append_json, parse_json

Line = TypeVar("Line")  # a dataclass


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


class ResumeFile(Generic[Line]):
    """The lines of one run. The file's name depends on `settings`, so others have other files.

    `line_of` makes a dataclass of a line's fields; ValueError and TypeError say that it is none.
    """

    def __init__(self, result_path: Path, settings: Any, line_of: Callable[..., Line]):
        encoded = json.dumps(settings, sort_keys=True, default=str).encode()
        key = hashlib.sha256(encoded).hexdigest()[:8]
        self.path = result_path.with_name(f"{result_path.stem}.{key}.part.jsonl")
        self.line_of = line_of

    def read(self) -> list[Line]:
        """The complete lines; the file is truncated after them."""
        lines: list[Line] = []
        if not self.path.exists():
            return lines
        complete_bytes = 0
        with self.path.open("rb") as file:
            for text in file:
                try:
                    line = self.line_of(**parse_json(text))
                except (ValueError, TypeError):
                    break
                if not text.endswith(b"\n"):
                    break
                lines.append(line)
                complete_bytes += len(text)
        os.truncate(self.path, complete_bytes)
        return lines

    def append(self, line: Line) -> None:
        """Write a line through to the disk."""
        append_json(self.path, asdict(line))  # type: ignore[call-overload]  # a dataclass

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
