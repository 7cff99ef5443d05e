"""POPE, polling for objects that are not there (arXiv:2305.10355): yes or no.

Reads the published JSON lines: `question_id`, `image`, `text`, `label`. Of a folder all
`*pope*.json` files are read. The kind is what follows "pope_" in a file's name (random, popular,
adversarial), or `category` of the line. The question gets the usual suffix for short answers,
which the authors' prompt does not have. Also LLaVA's prepared llava_pope_test.jsonl, with the files
of labels (coco_pope_random.json …) in `coco` or beside.

The authors' rule: if a word of the response's first sentence, without commas, is "No", "no" or
"not", it means no. Anything else means yes, an empty response too. Words end at blanks only, as in
the authors' script. Besides accuracy they report precision, recall and F1 of yes,
and the share of yes. Where a figure divides by zero their script fails; here it is 0.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ...checkpoints.errors import UserError
from ...checkpoints.reading.paths import find_files
from . import BadRecords, Question, Source
from .prepared import Annotate, is_prepared, read_prepared, without_suffix
from .records import (
    RecordError,
    existing_file,
    existing_folder,
    id_field,
    image_file,
    json_lines,
    numbered_lines,
    optional_field,
    parse_object,
    questions_from,
    text_field,
)
from .shared_rules import ONE_WORD

NO_WORDS = {"No", "no", "not"}


def read(source: Source, bad: BadRecords) -> Iterator[Question]:
    """The questions of a file or folder. Raises UserError where either is missing."""
    if is_prepared(source.path):
        return read_prepared(source, bad, "val2014", _annotate(source.path))
    paths = find_files(source.path, "*pope*.json*") if source.path.is_dir() else [source.path]
    if not paths:
        raise UserError(f"{source.path} holds no file such as coco_pope_random.json")
    inside = source.path if source.path.is_dir() else source.path.parent
    images = existing_folder(source.images or inside)
    return _questions([existing_file(path) for path in paths], images, bad)


def _questions(paths: list[Path], images: Path, bad: BadRecords) -> Iterator[Question]:
    for path in paths:
        kind = path.stem.partition("pope_")[2] or "all"
        yield from questions_from(numbered_lines(path), partial(_question, kind, images), bad)


def _question(kind: str, images: Path, line: bytes) -> list[Question]:
    record = parse_object(line)
    label = _label(record)
    kind = optional_field(record, "category", kind)
    question = Question(
        id=f"{kind}-{id_field(record, 'question_id')}",
        text=f"{text_field(record, 'text')}\n{ONE_WORD}",
        answers=(label,),
        image=image_file(images, text_field(record, "image")),
        kind=kind,
    )
    return [question]


def _annotate(path: Path) -> Annotate:
    """What adds the labels to LLaVA's questions, by kind, image and text."""
    folders = (path.parent / "coco", path.parent)
    files = [file for folder in folders for file in find_files(folder, "coco_pope_*.json")]
    labels = {
        (file.stem.partition("pope_")[2], record.get("image"), record.get("text")): record
        for file in files
        for record in json_lines(file)
    }

    def annotate(question: Question) -> Question:
        question, image = replace(question, id=f"{question.kind}-{question.id}"), question.image
        assert isinstance(image, Path)
        if not labels:
            return question
        key = (question.kind, image.name, without_suffix(question.text))
        if key not in labels:
            raise RecordError(f"the files of labels do not have this question of {question.kind}")
        return replace(question, answers=(_label(labels[key]),))

    return annotate


def _label(record: dict[str, Any]) -> str:
    label = text_field(record, "label").lower()
    if label not in ("yes", "no"):
        raise RecordError(f"label is {label[:40]!r}; it is yes or no")
    return label


def yes_or_no(response: str) -> str:
    """ "yes" or "no", by the authors' rule."""
    words = response.strip().split(".")[0].replace(",", "").split(" ")
    return "no" if NO_WORDS & set(words) else "yes"


def score(question: Question, response: str) -> float:
    """1 where the response means the label, else 0."""
    return float(yes_or_no(response) == question.answers[0])


def extra_figures(
    questions: list[Question], responses: list[str], scores: list[float]
) -> dict[str, float]:
    """Accuracy, precision, recall, F1 and the share of yes, in %."""
    labels = [question.answers[0] for question in questions]
    pairs = list(zip(labels, map(yes_or_no, responses), strict=True))
    hits = pairs.count(("yes", "yes"))
    predicted = sum(response == "yes" for _, response in pairs)
    actual = labels.count("yes")
    right = sum(label == response for label, response in pairs)
    return {
        "accuracy": _percent(right, len(pairs)),
        "precision": _percent(hits, predicted),
        "recall": _percent(hits, actual),
        "F1": _percent(2 * hits, predicted + actual),
        "share of yes": _percent(predicted, len(pairs)),
    }


def _percent(part: int, total: int) -> float:
    return 100 * part / total if total else 0.0
