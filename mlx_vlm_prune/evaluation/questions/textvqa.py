"""TextVQA, reading in the wild (arXiv:1904.08920), judged by VQA's soft accuracy (1505.00468).

Reads the published JSON: `data`, a list of `question_id`, `question`, `image_id` and ten
`answers`; images are `image_id`.jpg. The question gets the usual suffix for short answers. The
text that OCR finds is not given. Also LLaVA's prepared llava_textvqa_val_v051_ocr.jsonl, with
TextVQA_0.5.1_val.json beside; its prompts list that text, which measures copying as well.

The authors' rule: ten people answered. Against nine of them a response scores min(1, m / 3), where
m of the nine gave the same answer; this is averaged over the ten ways to leave one out. Both sides
are normalised first, see vqa_normalise.py. The first right answer, whose log-probability is
measured, is the most frequent one, and among equals the earlier.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...checkpoints.errors import UserError
from . import BadRecords, Question, Source
from .prepared import Annotate, annotation_file, is_prepared, read_prepared
from .records import (
    RecordError,
    id_field,
    image_file,
    load_json,
    questions_from_json,
    text_field,
    text_list_field,
)
from .shared_rules import ONE_WORD
from .vqa_normalise import normalise

ANNOTATORS = 10
_BETWEEN = re.compile(r"Question: (.*?) Short answer:", re.S)


def read(source: Source, bad: BadRecords) -> Iterator[Question]:
    """The questions of a JSON file. Raises UserError where it or the images' folder is missing."""
    if is_prepared(source.path):
        return read_prepared(source, bad, "train_images", _annotate(source.path))
    return questions_from_json(source, bad, _records(source.path), _questions)


def _records(path: Path) -> list[Any]:
    records = load_json(path, dict).get("data")
    if not isinstance(records, list):
        raise UserError(f"{path} must hold a list called data")
    return records


def _questions(number: str, record: dict[str, Any], images: Path) -> Iterator[Question]:
    text = f"{text_field(record, 'question')}\n{ONE_WORD}"
    image = image_file(images, f"{id_field(record, 'image_id')}.jpg")
    yield _annotated(Question(id_field(record, "question_id"), text, (), image), record)


def _annotated(question: Question, record: dict[str, Any]) -> Question:
    answers = text_list_field(record, "answers")
    if len(answers) != ANNOTATORS:
        raise RecordError(f"there are {len(answers)} answers; the rule needs {ANNOTATORS}")
    return replace(
        question,
        answers=tuple(answer for answer, _ in Counter(answers).most_common()),
        scoring_data=tuple(normalise(answer) for answer in answers),
    )


def _annotate(path: Path) -> Annotate:
    """What adds the right answers to LLaVA's questions, by image and text."""
    file = annotation_file(path, "TextVQA_*val.json")
    records = {
        (str(record.get("image_id")), str(record.get("question")).lower()): record
        for record in (_records(file) if file else ())
        if isinstance(record, dict)
    }

    def annotate(question: Question) -> Question:
        if not file:
            return question
        record = records.get((question.id, _question_in(question.text).lower()))
        if record is None:
            raise RecordError(f"{file} does not have this question about {question.id}")
        return replace(_annotated(question, record), id=id_field(record, "question_id"))

    return annotate


def _question_in(prompt: str) -> str:
    """The question in one of LLaVA's prompts, which list the text that OCR finds in three ways."""
    if prompt.startswith("OCR tokens: ") and (match := _BETWEEN.search(prompt)):
        return match.group(1)
    lines = prompt.split("\n")
    return lines[1] if lines[0].startswith("Reference OCR token:") and len(lines) > 2 else lines[0]


def score(question: Question, response: str) -> float:
    """VQA's soft accuracy, 0 to 1: 0.3, 0.6, 0.9 for one, two, three of ten; 1 for more."""
    m, n = question.scoring_data.count(normalise(response)), len(question.scoring_data)
    return (m * min(1.0, (m - 1) / 3) + (n - m) * min(1.0, m / 3)) / n
