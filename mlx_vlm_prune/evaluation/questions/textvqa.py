"""TextVQA, reading in the wild (arXiv:1904.08920), judged by VQA's soft accuracy (1505.00468).

Reads the published JSON: `data`, a list of `question_id`, `question`, `image_id` and ten
`answers`; images are `image_id`.jpg. The question gets the usual suffix for short answers. The
text that OCR finds is not given (LLaVA's prompt lists it, which measures copying instead).

The authors' rule: ten people answered. Against nine of them a response scores min(1, m / 3), where
m of the nine gave the same answer; this is averaged over the ten ways to leave one out. Both sides
are normalised first, see vqa_normalise.py. The first right answer, whose log-probability is
measured, is the most frequent one, and among equals the earlier.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...checkpoints.errors import UserError
from . import BadRecords, Question, Source
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


def read(source: Source, bad: BadRecords) -> Iterator[Question]:
    """The questions of a JSON file. Raises UserError where it or the images' folder is missing."""
    records = load_json(source.path, dict).get("data")
    if not isinstance(records, list):
        raise UserError(f"{source.path} must hold a list called data")
    return questions_from_json(source, bad, records, _questions)


def _questions(number: str, record: dict[str, Any], images: Path) -> Iterator[Question]:
    answers = text_list_field(record, "answers")
    if len(answers) != ANNOTATORS:
        raise RecordError(f"there are {len(answers)} answers; the rule needs {ANNOTATORS}")
    yield Question(
        id=id_field(record, "question_id"),
        text=f"{text_field(record, 'question')}\n{ONE_WORD}",
        answers=tuple(answer for answer, _ in Counter(answers).most_common()),
        image=image_file(images, f"{id_field(record, 'image_id')}.jpg"),
        scoring_data=tuple(normalise(answer) for answer in answers),
    )


def score(question: Question, response: str) -> float:
    """VQA's soft accuracy, 0 to 1: 0.3, 0.6, 0.9 for one, two, three of ten; 1 for more."""
    m, n = question.scoring_data.count(normalise(response)), len(question.scoring_data)
    return (m * min(1.0, (m - 1) / 3) + (n - m) * min(1.0, m / 3)) / n
