"""MMBench (arXiv:2307.06281): one of up to four options, asked in every rotation.

Reads the published TSV: `index`, `question`, `hint`, `A` to `D`, `answer`, `category`,
`l2-category`, `image` (base64, or the index of an earlier row with the same image). Options end at
the first that is empty, nan or none. Rows from index 1,000,000 on are rotations made in advance;
they are left out, since all rotations are made here (mmbench_rows.py asks the rows as they stand).

The authors' rule, circular evaluation: a question with n options is asked n times, the options
rotated by one each time, and counts only if all n responses are right. A response names an option
by a single lone letter among its last four words; or, when it is not much longer than the options,
by the text of one option only. Where neither decides the authors ask a language model; here the
response is wrong. The kind is `l2-category`, else `category`.
"""

import base64
import binascii
import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from ...checkpoints.errors import UserError
from . import BadRecords, Question, Source
from .records import LONGEST_LINE, RecordError, existing_file, questions_from, text_field
from .shared_rules import LETTERS, ONE_LETTER, lettered_options

MOST_OPTIONS = 4
FIRST_ROTATED_INDEX = 1_000_000  # of rows that repeat others with rotated options
PUNCTUATION = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
COLUMNS = ("index", "question", "A", "B", "answer", "image")


def read(source: Source, bad: BadRecords) -> Iterator[Question]:
    """The questions of a TSV file, n for n options. Raises UserError where it cannot be read."""
    path = existing_file(source.path)
    columns_of(path, COLUMNS)
    images: dict[str, bytes] = {}
    return questions_from(table_rows(path), lambda row: _questions(row, images), bad)


def columns_of(path: Path, needed: Sequence[str]) -> list[str]:
    """The columns of a TSV file. Raises UserError where a needed one is missing."""
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        columns = file.readline(LONGEST_LINE).rstrip("\r\n").split("\t")
    missing = [name for name in needed if name not in columns]
    if missing:
        raise UserError(f"{path} has no column {missing[0]} in its first line")
    return columns


def table_rows(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of a TSV file, each with its place in words."""
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST_LINE))  # pictures are long fields
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t")
        while True:
            try:
                row = next(rows, None)
            except csv.Error as e:
                raise UserError(f"{path}, line {rows.line_num}: {e}") from None
            if row is None:
                return
            yield f"{path}, line {rows.line_num}", row


def _questions(row: dict[str, str], images: dict[str, bytes]) -> list[Question]:
    """A question for each rotation of the options; `images` are those of the rows so far."""
    index = text_field(row, "index")
    if index.isdecimal() and int(index[:12]) >= FIRST_ROTATED_INDEX:
        return []
    choices = choices_of(row)
    if len(choices) < 2:
        raise RecordError("there are fewer than two options")
    right = text_field(row, "answer")
    if right not in LETTERS[: len(choices)] or len(right) != 1:
        letters = ", ".join(LETTERS[: len(choices)])
        raise RecordError(f"answer is {right[:40]!r}; it is one of {letters}")
    image = image_of(row, images)
    kind = value_of(row, "l2-category") or value_of(row, "category") or "all"
    hint = value_of(row, "hint")
    lead = (f"{hint}\n" if hint else "") + text_field(row, "question")
    questions = []
    for turn in range(len(choices)):
        rotated = choices[turn:] + choices[:turn]
        letter = LETTERS[(LETTERS.index(right) - turn) % len(choices)]
        text = f"{lead}\n{lettered_options(rotated)}\n{ONE_LETTER}"
        question_id, options = f"{index}-{turn}", tuple(rotated)
        questions.append(Question(question_id, text, (letter,), image, kind, index, options))
    return questions


def choices_of(row: dict[str, str]) -> list[str]:
    """The options of a row, up to the first that is empty."""
    choices = []
    for letter in LETTERS[:MOST_OPTIONS]:
        if not (value := value_of(row, letter)):
            break
        choices.append(value)
    return choices


def value_of(row: dict[str, str], key: str) -> str:
    """The text of a cell; empty for nan and none."""
    value = (row.get(key) or "").strip()
    return "" if value.lower() in ("nan", "none") else value


def image_of(row: dict[str, str], images: dict[str, bytes]) -> bytes:
    """The image of a row, which is kept in `images` for later rows."""
    images[row["index"].strip()] = image = _decoded(text_field(row, "image"), images)
    return image


def _decoded(cell: str, images: dict[str, bytes]) -> bytes:
    if len(cell) < 64 and cell.isdecimal():
        if cell not in images:
            raise RecordError(f"its image is that of row {cell}, which is not above it")
        return images[cell]
    try:
        return base64.b64decode(cell, validate=True)
    except (binascii.Error, ValueError):
        raise RecordError("image is not valid base64") from None


def chosen_letter(response: str, choices: tuple[str, ...]) -> str:
    """The letter of the option that a response names, or "" where it names none."""
    words = response.translate(PUNCTUATION).split()
    letters = [letter for letter in LETTERS[: len(choices)] if letter in words]
    if len(letters) == 1 and words.index(letters[0]) > len(words) - 5:
        return letters[0]
    response = response.lower()
    if len(response) > 2 * sum(map(len, choices)):
        return ""
    named = [n for n, choice in enumerate(choices) if choice.lower() in response]
    return LETTERS[named[0]] if len(named) == 1 else ""


def score(question: Question, response: str) -> float:
    """1 where the response to this rotation is right, else 0."""
    return float(chosen_letter(response, question.scoring_data) == question.answers[0])


def group_score(scores: list[float]) -> float:
    """1 where every rotation is right, else 0."""
    return float(min(scores) == 1)
