"""TextVQA, reading in the wild (arXiv:1904.08920), judged by VQA's soft accuracy (1505.00468).

Read is the published JSON: `data`, a list of `question_id`, `question`, `image_id` and ten
`answers`; images are `image_id`.jpg. The question gets the field's suffix for short answers and
no recognised text beside it (LLaVA's prompt lists it, and what is measured then is copying).

The authors' rule: ten people answered. Against nine of them an answer counts min(1, m / 3),
m of the nine having said the same; that is averaged over the ten ways to leave one out. Both
sides are normalised first, see vqa_words.py. The first right answer, whose log-probability is
measured, is the most frequent one, and among equals the earlier.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...checkpoints.errors import UserError
from . import Bad, Question, Source
from .answers import ONE_WORD
from .reading import Fault, each_entry, image_file, name_of, text_of, texts_of, whole_json
from .vqa_words import normalise

PEOPLE = 10


def read(source: Source, bad: Bad) -> Iterator[Question]:
    """The questions of a JSON file. Raises UserError where it or the images' folder is missing."""
    records = whole_json(source.path, dict).get("data")
    if not isinstance(records, list):
        raise UserError(f"{source.path} must hold a list called data")
    return each_entry(source, bad, records, _questions)


def _questions(number: str, record: dict[str, Any], home: Path) -> Iterator[Question]:
    given = texts_of(record, "answers")
    if len(given) != PEOPLE:
        raise Fault(f"there are {len(given)} answers; the rule needs {PEOPLE}")
    yield Question(
        id=name_of(record, "question_id"),
        text=f"{text_of(record, 'question')}\n{ONE_WORD}",
        answers=tuple(answer for answer, _ in Counter(given).most_common()),
        image=image_file(home, f"{name_of(record, 'image_id')}.jpg"),
        told=tuple(normalise(answer) for answer in given),
    )


def score(question: Question, said: str) -> float:
    """VQA's soft accuracy, 0 to 1: 0.3, 0.6, 0.9 for one, two, three of ten; 1 for more."""
    m, n = question.told.count(normalise(said)), len(question.told)
    return (m * min(1.0, (m - 1) / 3) + (n - m) * min(1.0, m / 3)) / n
