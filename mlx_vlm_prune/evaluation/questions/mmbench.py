"""MMBench (arXiv:2307.06281): one of up to four options, asked in every rotation.

Read is the published TSV: `index`, `question`, `hint`, `A` to `D`, `answer`, `category`,
`l2-category`, `image` (base64, or the index of the row that has it). Options end at the first
that is empty, nan or none. Rows from index 1,000,000 on are rotations made in advance; they
are left out, since all rotations are made here.

The authors' rule, circular evaluation: a question with n options is asked n times, the options
moved on by one each time, and counts only if all n answers are right. An answer names an option
by a letter that stands alone, the only one, among its last four words; or, when it is not much
longer than the options, by the text of one option only. Where neither decides the authors ask
a language model; here the answer is wrong. The kind is `l2-category`, else `category`.
"""

import base64
import binascii
import csv
from collections.abc import Iterator
from pathlib import Path

from ...checkpoints.errors import UserError
from . import Bad, Question, Source
from .answers import LETTERS, ONE_LETTER, options
from .reading import LONGEST_LINE, Fault, each, existing, text_of

MOST = 4
MADE_IN_ADVANCE = 1_000_000
PUNCTUATION = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
NEEDED = ("index", "question", "A", "B", "answer", "image")


def read(source: Source, bad: Bad) -> Iterator[Question]:
    """The questions of a TSV file, n for n options. Raises UserError where it cannot be read."""
    with existing(source.path).open(encoding="utf-8-sig", errors="replace", newline="") as file:
        columns = file.readline(LONGEST_LINE).rstrip("\r\n").split("\t")
    missing = [name for name in NEEDED if name not in columns]
    if missing:
        raise UserError(f"{source.path} has no column {missing[0]} in its first line")
    seen: dict[str, bytes] = {}
    return each(_rows(source.path), lambda row: _questions(row, seen), bad)


def _rows(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
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


def _questions(row: dict[str, str], seen: dict[str, bytes]) -> list[Question]:
    name = text_of(row, "index")
    if name.isdecimal() and int(name[:12]) >= MADE_IN_ADVANCE:
        return []
    choices = _choices(row)
    if len(choices) < 2:
        raise Fault("there are fewer than two options")
    right = text_of(row, "answer")
    if right not in LETTERS[: len(choices)] or len(right) != 1:
        raise Fault(f"answer is {right[:40]!r}; it is one of {', '.join(LETTERS[: len(choices)])}")
    image = seen[name] = _image(text_of(row, "image"), seen)
    kind = next((k for key in ("l2-category", "category") if (k := _value(row, key))), "all")
    place, lead = LETTERS.index(right), _value(row, "hint")
    asked = (f"{lead}\n" if lead else "") + text_of(row, "question")
    made = []
    for turn in range(len(choices)):
        turned = choices[turn:] + choices[:turn]
        letter = LETTERS[(place - turn) % len(choices)]
        text = f"{asked}\n{options(turned)}\n{ONE_LETTER}"
        told = tuple(turned)
        made.append(Question(f"{name}-{turn}", text, (letter,), image, kind, name, told))
    return made


def _choices(row: dict[str, str]) -> list[str]:
    choices = []
    for letter in LETTERS[:MOST]:
        if not (value := _value(row, letter)):
            break
        choices.append(value)
    return choices


def _value(row: dict[str, str], key: str) -> str:
    value = (row.get(key) or "").strip()
    return "" if value.lower() in ("nan", "none") else value


def _image(told: str, seen: dict[str, bytes]) -> bytes:
    if len(told) < 64 and told.isdecimal():
        if told not in seen:
            raise Fault(f"its image is that of row {told}, which is not above it")
        return seen[told]
    try:
        return base64.b64decode(told, validate=True)
    except (binascii.Error, ValueError):
        raise Fault("image is not valid base64") from None


def chosen(said: str, choices: tuple[str, ...]) -> str:
    """The letter that an answer means, or "" where it does not say."""
    words = said.translate(PUNCTUATION).split()
    letters = [letter for letter in LETTERS[: len(choices)] if letter in words]
    if len(letters) == 1 and words.index(letters[0]) > len(words) - 5:
        return letters[0]
    said = said.lower()
    if len(said) > 2 * sum(map(len, choices)):
        return ""
    named = [n for n, choice in enumerate(choices) if choice.lower() in said]
    return LETTERS[named[0]] if len(named) == 1 else ""


def score(question: Question, said: str) -> float:
    """1 where this rotation is answered right, else 0."""
    return float(chosen(said, question.told) == question.answers[0])


def together(scores: list[float]) -> float:
    """1 where every rotation is right, else 0."""
    return float(min(scores) == 1)
