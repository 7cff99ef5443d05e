"""What a run has done so far, in a file beside its result, to resume from.

The file holds JSON lines, one for each method's answers to a batch of an evaluation, or each round
of a sweep, flushed to the disk before the next begins. A line that was cut off, by a power failure
or a full disk, is dropped. So is one that does not go on where the one before it ended, with all
lines after it.

Shapes: B questions of a batch, I their images.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from ..checkpoints.reading.files import append_json, parse_json
from ..checkpoints.user_module import file_digests

MOST_IDS = 1 << 31  # of any vocabulary
Line = TypeVar("Line")  # a dataclass


@dataclass(frozen=True)
class AnsweredBatch:
    """A method's answers to a batch of questions. The field names are the file's keys.

    `questions_done` is how many questions of the set are done after this batch. `numbers` are
    those of its questions, without those in `skipped`. A batch has a line for each method that has
    not failed, full (0) first; that one alone has `sizes` and `skipped`. `refused` says why the
    method failed in this batch: it has no line from here on. `drafts` are the figures of
    `DraftFigures`, where a twig drafted.
    """

    questions_done: int
    method: int
    numbers: list[int]
    ids: list[list[int]]  # of the B answers
    logprob: list[float]  # (B,): of the right answers
    seconds: float
    sizes: list[int] = field(default_factory=list)  # (I,): visual tokens of each image
    skipped: list[str] = field(default_factory=list)
    refused: str = ""
    drafts: list[Any] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)  # (I,): where images have budgets of their own

    @property
    def is_whole(self) -> bool:
        """Whether there is an answer to every question, or the reason why there is none."""
        answers = 0 if self.refused else len(self.numbers)
        are_ids = all(isinstance(i, int) and 0 <= i < MOST_IDS for one in self.ids for i in one)
        return are_ids and len(self.ids) == len(self.logprob) == answers


class ResumeFile(Generic[Line]):
    """The lines of one run. The file's name depends on `settings`, so others have other files, and
    on what files of the user's own methods hold, so that no answers of an earlier version stay.

    `line_of` makes a dataclass of a line's fields; ValueError and TypeError say that it is none.
    """

    def __init__(self, result_path: Path, settings: Any, line_of: Callable[..., Line]):
        methods = file_digests()
        settings = [settings, methods] if methods else settings
        encoded = json.dumps(settings, sort_keys=True, default=str).encode()
        key = hashlib.sha256(encoded).hexdigest()[:8]
        self.path = result_path.with_name(f"{result_path.stem}.{key}.part.jsonl")
        self.line_of = line_of

    def read(self, goes_on: Callable[[Line], bool]) -> list[Line]:
        """The complete lines, as long as each goes on from those before it; the file is truncated
        after them. `goes_on` is asked about one line after the other."""
        lines: list[Line] = []
        if not self.path.exists():
            return lines
        complete_bytes = 0
        with self.path.open("rb") as file:
            for text in file:
                try:
                    line = self.line_of(**parse_json(text))
                    if not (text.endswith(b"\n") and goes_on(line)):
                        break
                except (ValueError, TypeError):
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
