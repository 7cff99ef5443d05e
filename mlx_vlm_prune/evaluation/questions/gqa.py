"""GQA, compositional questions about real scenes (arXiv:1902.09506).

Reads the published question files, such as testdev_balanced_questions.json: an object from a
question's id to `question`, `imageId`, `answer` and `types`. Images are `imageId`.jpg. The kind
is `types.structural` (query, verify, choose, logical, compare).

The authors' rule is equality with the one answer. As is common, case, white space and a final full
stop do not count, and the question gets a suffix that asks for a short answer. The authors'
further figures (consistency, validity, plausibility, grounding) are not computed.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import BadRecords, Question, Source
from .records import (
    id_field,
    image_file,
    load_json,
    optional_field,
    questions_from_json,
    text_field,
)
from .shared_rules import ONE_WORD
from .shared_rules import exact_match as score

__all__ = ["read", "score"]


def read(source: Source, bad: BadRecords) -> Iterator[Question]:
    """The questions of a JSON file. Raises UserError where it or the images' folder is missing."""
    return questions_from_json(source, bad, load_json(source.path, dict), _questions)


def _questions(question_id: str, record: dict[str, Any], images: Path) -> Iterator[Question]:
    types = record.get("types")
    yield Question(
        id=question_id,
        text=f"{text_field(record, 'question')}\n{ONE_WORD}",
        answers=(text_field(record, "answer"),),
        image=image_file(images, f"{id_field(record, 'imageId')}.jpg"),
        kind=optional_field(types, "structural", "all") if isinstance(types, dict) else "all",
    )
