"""JSON lines of a user's own: `image` or `images`; `question` and `answer`, or `conversations`.

    {"image": "a.png", "question": "What colour is the star?", "answer": "grey"}
    {"images": ["a.png", "b.png"], "conversations": [
        {"role": "user", "content": "<image> and <image>: the same?"},
        {"role": "assistant", "content": "No."}]}

Paths are relative to the images' folder or else to the file.
"""

from pathlib import Path
from typing import Any

import numpy as np

from ...checkpoints.errors import UserError
from ...evaluation.questions.records import (
    RecordError,
    existing_file,
    image_file,
    parse_object,
    text_field,
    text_list_field,
)
from ..examples import Example


class JsonLines:
    """Lines by their number; only where each begins is held."""

    def __init__(self, path: Path, images: Path):
        self.path, self.images = path, images
        starts, offset = [], 0
        with path.open("rb") as file:
            for line in file:
                starts += [offset] if line.strip() else []
                offset += len(line)
        self.starts = np.array(starts, np.int64)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Example:
        where = f"{self.path}, example {index + 1}"
        with self.path.open("rb") as file:
            file.seek(int(self.starts[index]))
            line = file.readline()
        try:
            return example_of(parse_object(line), self.images, where)
        except RecordError as e:
            raise UserError(f"{where}: {e}") from None


def open_dataset(path: Path, images: Path | None) -> JsonLines:
    """The lines of a file. Raises UserError where it is missing."""
    path = existing_file(path)
    return JsonLines(path, images or path.parent)


def example_of(record: dict[str, Any], images: Path, where: str) -> Example:
    """The example of a record. Raises RecordError."""
    names = [text_field(record, "image")] if "image" in record else []
    names = text_list_field(record, "images") if "images" in record else names
    files = tuple(image_file(images, name) for name in names)
    if "conversations" not in record:
        pair = (text_field(record, "question"), text_field(record, "answer"))
        return Example(files, (pair,), where)
    return Example(files, tuple(turn_pairs(record["conversations"], "role", "content")), where)


def turn_pairs(
    turns: Any, speaker_key: str, text_key: str,
    speakers: tuple[str, str] = ("user", "assistant"),
) -> list[tuple[str, str]]:  # fmt: skip
    """The (question, answer) pairs of a conversation. Raises RecordError."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise RecordError("conversations is not a list of turns")
    dialogue = [turn for turn in turns if turn.get(speaker_key) in speakers]
    in_turns = all(turn[speaker_key] == speakers[n % 2] for n, turn in enumerate(dialogue))
    if not dialogue or len(dialogue) % 2 or not in_turns:
        raise RecordError(f"turns of {speakers[0]} and {speakers[1]} do not alternate")
    texts = [text_field(turn, text_key) for turn in dialogue]
    return list(zip(texts[::2], texts[1::2], strict=True))
