"""MMMU, questions of university courses in 30 subjects (arXiv:2311.16502).

Reads the folder as it is published on Hugging Face: a folder for each subject with parquet files,
whose names begin with the split (validation, unless another is named), or one parquet file. A row
holds `id`, `question`, `options` (a list as a Python text), `image_1` to `image_7`, `answer` and
`question_type`. All its images are given, in order and ahead of the text, in which "<image 2>"
stays (the authors' run of LLaVA gave the first only). The kind is the subject. Where the answer is
"?" (split test) nothing is scored.

The authors' rule for several options: the last letter in brackets, else the last lone letter, else
(in a response of more than five words) the option whose text stands last; else they guess. Their
guess is drawn at random; ours is drawn from the question's id, so that it repeats. An open
question is right if an answer's text is part of what follows the last "is", "so", "=" and the like
of a line, or one of the numbers there is the answer's, to two decimals.
"""

import ast
import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any

from ...checkpoints.errors import UserError
from ...checkpoints.reading.paths import find_files
from . import BadRecords, Question, Source
from .parquet import open_parquet, parquet_rows
from .records import RecordError, questions_from, text_field
from .shared_rules import LETTERS, ONE_LETTER, ONE_WORD

SPLIT, UNKNOWN = "validation", "?"
COLUMNS = ("id", "question", "options", "image_1", "answer", "question_type")
MORE_IMAGES = [f"image_{n}" for n in range(2, 8)]
LONGEST_LIST = 1 << 16  # characters of options
DOMAINS = {
    "Art": "Art Art_Theory Design Music",
    "Business": "Accounting Economics Finance Manage Marketing",
    "Science": "Biology Chemistry Geography Math Physics",
    "Medicine": "Basic_Medical_Science Clinical_Medicine Diagnostics_and_Laboratory_Medicine"
    " Pharmacy Public_Health",
    "Humanities": "History Literature Sociology Psychology",
    "Engineering": "Agriculture Architecture_and_Engineering Computer_Science Electronics"
    " Energy_and_Power Materials Mechanical_Engineering",
}
MARKS = ",.!?;:'"
SHORT = 5  # words; an option's text is sought in longer responses only
LEADS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
TRIVIAL = (":", ",", ".", "!", "?", ";", "'")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)


def read(source: Source, bad: BadRecords) -> Iterator[Question]:
    """The questions of a folder or a parquet file. Raises UserError where there is none."""
    path, split = source.path, source.split or SPLIT
    files = find_files(path, f"{split}-*.parquet", f"*/{split}-*.parquet")
    files = files if path.is_dir() else [path]
    if not files or not path.exists():
        raise UserError(f"{path} holds no file such as Accounting/{split}-00000-of-00001.parquet")
    opened = [(open_parquet(file, COLUMNS), file) for file in files]
    rows = (row for file, name in opened for row in parquet_rows(file, name, _columns(file)))
    return questions_from(rows, lambda row: [_question(row[1])], bad)


def _columns(file: Any) -> list[str]:
    more = [name for name in MORE_IMAGES if name in file.schema_arrow.names]
    return [*COLUMNS, *more]


def _question(row: dict[str, Any]) -> Question:
    name, text = text_field(row, "id"), text_field(row, "question")
    subject = "_".join(name.split("_")[1:-1]) or "all"
    answer, image = text_field(row, "answer"), _image(row, "image_1")
    more = tuple(_image(row, name) for name in MORE_IMAGES if row.get(name) is not None)
    options: tuple[str, ...] = ()
    answers: tuple[str, ...] = (answer,)
    if row["question_type"] == "multiple-choice":
        options = _texts(text_field(row, "options"))
        letters = LETTERS[: len(options)]
        if not options or len(options) > len(LETTERS):
            raise RecordError(f"there are {len(options)} options; 1 to {len(LETTERS)} have letters")
        if answer not in (*letters, UNKNOWN):
            raise RecordError(f"answer is {answer[:40]!r}; it is one of {', '.join(letters)}")
        choices = "".join(f"({a}) {b}\n" for a, b in zip(letters, options, strict=True))
        text = f"{text}\n{choices}\n{ONE_LETTER}"
    else:
        text = f"{text}\n{ONE_WORD}"
        answers = _texts(answer) if answer.startswith("[") else answers
    is_known = answers and UNKNOWN not in answers
    return Question(
        name, text, answers if is_known else (), image, subject, scoring_data=options,
        more_images=more,
    )  # fmt: skip


def _image(row: dict[str, Any], name: str) -> bytes:
    cell = row[name]
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    if not isinstance(content, bytes) or not content:
        raise RecordError(f"{name} holds no image")
    return content


def _texts(text: str) -> tuple[str, ...]:
    """The texts of a list that is written as in Python; numbers become texts."""
    try:
        if len(text) > LONGEST_LIST:
            raise ValueError
        values = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise RecordError(f"{text[:40]!r} is not a list of texts") from None
    if not isinstance(values, list) or not all(isinstance(v, str | int | float) for v in values):
        raise RecordError(f"{text[:40]!r} is not a list of texts")
    return tuple(str(value) for value in values)


def chosen_letter(response: str, options: tuple[str, ...], name: str) -> str:
    """The letter that a response names, or a guess that depends on the question's name."""
    for mark in MARKS:
        response = response.strip(mark)
    response, letters = f" {response} ", LETTERS[: len(options)]
    for form in ("({})", " {} "):
        places = {letter: response.rfind(form.format(letter)) for letter in letters}
        if max(places.values()) >= 0:
            return max(places, key=lambda letter: places[letter])
    if len(response.split()) > SHORT:
        lower = response.lower()
        places = {a: lower.rfind(b.lower()) for a, b in zip(letters, options, strict=True)}
        if max(places.values()) >= 0:
            return max(places, key=lambda letter: places[letter])
    return letters[int(hashlib.sha256(name.encode()).hexdigest(), 16) % len(letters)]


def open_answers(response: str) -> list[str | float]:
    """The texts and numbers that a response to an open question may mean, normalised."""
    response = response.strip().strip(".").lower()
    lines, parts = response.split("\n"), []
    for n, line in enumerate(lines):
        leads = (*LEADS, "=") if n == len(lines) - 1 else LEADS
        tails = [line.split(lead)[-1].strip() for lead in leads if lead in line]
        shortest = ""
        for tail in tails:  # an empty one gives way to any other
            shortest = tail if not shortest or len(tail) < len(shortest) else shortest
        if shortest and shortest not in TRIVIAL:
            parts.append(shortest)
    parts = parts or [response]
    numbers = [number for part in parts for form in _NUMBERS for number in form.findall(part)]
    return [form for part in (*parts, *numbers) for form in _normalised(part)]


def _normalised(text: str) -> list[str | float]:
    """A number to two decimals, or a text in lower case; one letter only beside a blank."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def score(question: Question, response: str) -> float:
    """1 where the response is right, else 0."""
    if question.scoring_data:
        return float(
            chosen_letter(response, question.scoring_data, question.id) == question.answers[0]
        )
    right = [form for answer in question.answers for form in _normalised(answer)]
    texts = [form for form in right if isinstance(form, str)]
    return float(
        any(
            any(text in part for text in texts) if isinstance(part, str) else part in right
            for part in open_answers(response)
        )
    )


def extra_figures(
    questions: list[Question], responses: list[str], scores: list[float]
) -> dict[str, float]:
    """The accuracy of each of the six domains that was asked, in %."""
    figures = {}
    for domain, subjects in DOMAINS.items():
        pairs = zip(questions, scores, strict=True)
        of_domain = [score for q, score in pairs if q.kind in subjects.split()]
        if of_domain:
            figures[domain] = 100 * sum(of_domain) / len(of_domain)
    return figures


def upload(questions: list[Question], responses: list[str], source: Source) -> dict[str, bytes]:
    """What the authors' `main_eval_only.py` and their server read: letters, and open responses."""
    parsed = {
        q.id: chosen_letter(response, q.scoring_data, q.id) if q.scoring_data else response
        for q, response in zip(questions, responses, strict=True)
    }
    return {".json": json.dumps(parsed, indent=4, ensure_ascii=False).encode()}
