"""LLaVA's data (arXiv:2304.08485): a JSON list of conversations about an image each, or about none.

    [{"id": "1", "image": "a.jpg", "conversations": [
        {"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A cat."}]}]

As in the authors' training (`preprocess_multimodal`), an image's mark stands first in its turn
wherever the file has it. The file of 665,000 records has 1 GB; only where each begins is held.
"""

import codecs
import json
from array import array
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from ...checkpoints.errors import UserError
from ...evaluation.questions.records import (
    ENCODING,
    LONGEST_LINE,
    RecordError,
    existing_file,
    existing_folder,
    parse_object,
)
from ...inputs.prompt import IMAGE_MARK
from ..examples import Example
from .records import example_of

CHUNK = 1 << 20  # bytes read at once
SPACE = " \t\r\n"


class JsonList:
    """Records of a JSON list by their number; only where each stands is held."""

    blocks = None

    def __init__(self, path: Path, images: Path):
        self.path, self.images = path, images
        self.begins, self.ends = array("q"), array("q")
        with path.open("rb") as file:
            for begin, end in _Scanner(path, file).spans():
                self.begins.append(begin)
                self.ends.append(end)

    def __len__(self) -> int:
        return len(self.begins)

    def __getitem__(self, index: int) -> Example:
        where = f"{self.path}, record {index + 1}"
        with self.path.open("rb") as file:
            file.seek(self.begins[index])
            text = file.read(self.ends[index] - self.begins[index])
        try:
            example = example_of(parse_object(text), self.images, where)
        except RecordError as e:
            raise UserError(f"{where}: {e}") from None
        turns = ((_mark_first(question), answer) for question, answer in example.turns)
        return replace(example, turns=tuple(turns))


def open_dataset(path: Path, images: Path | None) -> JsonList:
    """The records of a file. Raises UserError where it or the images' folder is missing."""
    path = existing_file(path)
    return JsonList(path, existing_folder(images or path.parent))


def _mark_first(question: str) -> str:
    if question.count(IMAGE_MARK) != 1:
        return question
    return f"{IMAGE_MARK}\n{question.replace(IMAGE_MARK, '').strip()}"


class _Scanner:
    """Goes through a JSON list piece by piece."""

    def __init__(self, path: Path, file: BinaryIO):
        self.path, self.file = path, file
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.json = json.JSONDecoder()
        self.text, self.at = "", 0  # what is read, and the place in it
        self.offset = 0  # in bytes, of that place
        self.at_end = False
        self.records = 0

    def spans(self) -> Iterator[tuple[int, int]]:
        """(begin, end) in bytes of each record. Raises UserError for what is no list of JSON."""
        if file_mark := self.file.read(len(codecs.BOM_UTF8)):
            if file_mark == codecs.BOM_UTF8:
                self.offset = len(file_mark)
            else:
                self.file.seek(0)
        if self._next_sign() != "[":
            raise UserError(f"{self.path} must hold a JSON list")
        self._pass(1)
        while (sign := self._next_sign()) != "]":
            if self.records:
                if sign != ",":
                    raise self._error("is not followed by , or ]")
                self._pass(1)
                self._next_sign()
            self.records += 1
            begin = self.offset
            self._pass(self._record_end() - self.at)
            yield begin, self.offset

    def _next_sign(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            start = self.at
            while start < len(self.text) and self.text[start] in SPACE:
                start += 1
            self._pass(start - self.at)
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._read_more():
                return ""

    def _pass(self, characters: int) -> None:
        passed = self.text[self.at : self.at + characters]
        self.offset += characters if passed.isascii() else len(passed.encode())
        self.at += characters

    def _record_end(self) -> int:
        while True:
            try:
                return self.json.raw_decode(self.text, self.at)[1]
            except RecursionError:
                raise self._error("is nested too deeply") from None
            except ValueError as e:
                problem = str(e)  # the error itself would hold the text
            if len(self.text) - self.at > LONGEST_LINE or not self._read_more():
                raise self._error(f"is not valid JSON ({problem})") from None

    def _read_more(self) -> bool:
        """Drop what has been passed and read at least as much as is waiting; False at the end."""
        self.text, self.at = self.text[self.at :], 0
        piece = self.file.read(max(CHUNK, len(self.text)))
        try:
            self.text += self.decoder.decode(piece, final=not piece)
        except UnicodeDecodeError:
            raise UserError(f"{self.path} is not {ENCODING[:5].upper()}") from None
        return bool(piece)

    def _error(self, fault: str) -> UserError:
        return UserError(f"{self.path}, record {self.records} {fault}")
