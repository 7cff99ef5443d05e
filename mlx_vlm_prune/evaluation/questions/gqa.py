"""GQA, compositional questions about real scenes (arXiv:1902.09506).

Reads the published question files, such as testdev_balanced_questions.json: an object from a
question's id to `question`, `imageId`, `answer` and `types`. Images are `imageId`.jpg. The kind
is `types.structural` (query, verify, choose, logical, compare). Also LLaVA's prepared
llava_gqa_testdev_balanced.jsonl, with testdev_balanced_questions.json in `data` or beside.

The authors' rule is equality with the one answer. As is common, case, white space and a final full
stop do not count, and the question gets a suffix that asks for a short answer. The authors'
further figures (consistency, validity, plausibility, grounding) are not computed here; `upload` is
the file of predictions that their `eval.py` reads.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import BadRecords, Question, Source
from .prepared import Annotate, annotation_file, is_prepared, read_prepared
from .records import (
    RecordError,
    id_field,
    image_file,
    load_json,
    optional_field,
    questions_from_json,
    text_field,
)
from .shared_rules import ONE_WORD
from .shared_rules import exact_match as score

__all__ = ["read", "score", "upload"]


def read(source: Source, bad: BadRecords) -> Iterator[Question]:
    """The questions of a JSON file. Raises UserError where it or the images' folder is missing."""
    if is_prepared(source.path):
        return read_prepared(source, bad, "data/images", _annotate(source.path))
    return questions_from_json(source, bad, load_json(source.path, dict), _questions)


def _questions(question_id: str, record: dict[str, Any], images: Path) -> Iterator[Question]:
    yield Question(
        id=question_id,
        text=f"{text_field(record, 'question')}\n{ONE_WORD}",
        answers=(text_field(record, "answer"),),
        image=image_file(images, f"{id_field(record, 'imageId')}.jpg"),
        kind=_structure(record),
    )


def _structure(record: dict[str, Any]) -> str:
    types = record.get("types")
    return optional_field(types, "structural", "all") if isinstance(types, dict) else "all"


def _annotate(path: Path) -> Annotate:
    """What adds the right answers to LLaVA's questions."""
    name = f"{path.stem.lower().removeprefix('llava_gqa_')}_questions.json"
    file = annotation_file(path, f"data/{name}", f"data/*/{name}", name)
    records = load_json(file, dict) if file else {}

    def annotate(question: Question) -> Question:
        if not file:
            return question
        if not isinstance(record := records.get(question.id), dict):
            raise RecordError(f"{file} has no question {question.id}")
        return replace(question, answers=(text_field(record, "answer"),), kind=_structure(record))

    return annotate


def upload(questions: list[Question], responses: list[str], source: Source) -> dict[str, bytes]:
    """The predictions that the authors' `eval.py` reads: lower case, no full stop at the end."""
    predictions = [
        {"questionId": q.id, "prediction": response.rstrip(".").lower()}
        for q, response in zip(questions, responses, strict=True)
    ]
    return {".json": json.dumps(predictions, ensure_ascii=False).encode()}
