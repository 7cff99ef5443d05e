"""GQA, compositional questions about real scenes (arXiv:1902.09506).

Read are the published question files, such as testdev_balanced_questions.json: an object from a
question's id to `question`, `imageId`, `answer` and `types`; images are `imageId`.jpg. The kind
is `types.structural` (query, verify, choose, logical, compare).

The authors' rule is equality with the one answer. As the field does, case, white space and a
final full stop do not count, and the question gets a suffix that asks for a short answer. The
authors' further figures (consistency, validity, plausibility, grounding) are not computed.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import Bad, Question, Source
from .answers import ONE_WORD
from .answers import exact as score
from .reading import each_entry, image_file, name_of, optional, text_of, whole_json

__all__ = ["read", "score"]


def read(source: Source, bad: Bad) -> Iterator[Question]:
    """The questions of a JSON file. Raises UserError where it or the images' folder is missing."""
    return each_entry(source, bad, whole_json(source.path, dict), _questions)


def _questions(name: str, record: dict[str, Any], home: Path) -> Iterator[Question]:
    types = record.get("types")
    yield Question(
        id=name,
        text=f"{text_of(record, 'question')}\n{ONE_WORD}",
        answers=(text_of(record, "answer"),),
        image=image_file(home, f"{name_of(record, 'imageId')}.jpg"),
        kind=optional(types, "structural", "all") if isinstance(types, dict) else "all",
    )
