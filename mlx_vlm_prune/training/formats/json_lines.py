"""JSON lines of a user's own: `image` or `images`; `question` and `answer`, or `conversations`.

    {"image": "a.png", "question": "What colour is the star?", "answer": "grey"}
    {"images": ["a.png", "b.png"], "conversations": [
        {"role": "user", "content": "<image> and <image>: the same?"},
        {"role": "assistant", "content": "No."}]}

Turns may be LLaVA's, `from` and `value`, too. Paths are relative to the images' folder or else to
the file.
"""

from array import array
from pathlib import Path

from ...checkpoints.errors import UserError
from ...evaluation.questions.records import (
    LONGEST_LINE,
    RecordError,
    existing_file,
    existing_folder,
    parse_object,
)
from ..examples import Example
from .records import example_of


class JsonLines:
    """Lines by their number; only where each begins is held."""

    blocks = None

    def __init__(self, path: Path, images: Path):
        self.path, self.images = path, images
        self.starts, self.numbers = array("q"), array("q")  # of lines that are not blank
        with path.open("rb") as file:
            offset = number = 0
            while line := file.readline(LONGEST_LINE + 1):
                number += 1
                if len(line) > LONGEST_LINE:
                    raise UserError(f"{path}, line {number} is longer than {LONGEST_LINE >> 20} MB")
                if line.strip():
                    self.starts.append(offset)
                    self.numbers.append(number)
                offset += len(line)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Example:
        where = f"{self.path}, line {self.numbers[index]}"
        with self.path.open("rb") as file:
            file.seek(self.starts[index])
            line = file.readline()
        try:
            return example_of(parse_object(line), self.images, where)
        except RecordError as e:
            raise UserError(f"{where}: {e}") from None


def open_dataset(path: Path, images: Path | None) -> JsonLines:
    """The lines of a file. Raises UserError where it or the images' folder is missing."""
    path = existing_file(path)
    return JsonLines(path, existing_folder(images or path.parent))
