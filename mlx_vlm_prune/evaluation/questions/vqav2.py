"""VQAv2, open questions about COCO's photographs (arXiv:1612.00837).

Reads the published questions, such as v2_OpenEnded_mscoco_val2014_questions.json, with the
annotations that lie beside (v2_mscoco_val2014_annotations.json); of a folder those of split
val2014, unless another is named. Images are COCO_val2014_000000000042.jpg, in a folder named after
the split or beside. Also LLaVA's prepared llava_vqav2_mscoco_SPLIT.jsonl. The question gets the
usual suffix for short answers. The kind is `answer_type` (yes/no, number, other).

The authors' rule: of the people who answered, usually ten, each is left out once; against the
others a response scores min(1, m / 3), where m gave the same answer; the mean counts. Unless all
people agree word by word, punctuation, articles, number words and contractions are normalised on
both sides. Responses are normalised before they are handed in (arXiv:2310.03744 does so): else
"Yes" would be wrong where all ten say "yes".

Of the splits test2015 and test-dev2015 the authors' server has the answers. Their questions are not
scored; `upload` is the file that the server takes. It must name every question of test2015: those
not asked get an empty answer if the questions of test2015 lie beside.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from ...checkpoints.errors import UserError
from ...checkpoints.reading.paths import find_files
from . import BadRecords, Question, Source
from .prepared import annotation_file, is_prepared, read_prepared
from .records import (
    RecordError,
    existing_file,
    existing_folder,
    id_field,
    image_file,
    json_lines,
    load_json,
    optional_field,
    questions_from,
    text_field,
)
from .shared_rules import ONE_WORD
from .vqa_normalise import REMEMBERED, by_words, normalise, without_breaks, without_punctuation

SPLIT = "val2014"
FEWEST_AGREEING = 3  # other people with whose answer a response is wholly right
_SPLIT_NAME = re.compile(r"mscoco_([\w-]+?)(_questions)?\.json", re.I)


def read(source: Source, bad: BadRecords) -> Iterator[Question]:
    """The questions of a file or folder. Raises UserError where either is missing."""
    path = _questions_file(source)
    answers = _annotations(path)
    annotate = (lambda question: question) if answers is None else partial(_annotated, answers)
    if is_prepared(path):
        return read_prepared(Source(path, source.images), bad, "test2015", annotate)
    content = load_json(path, dict)
    if not isinstance(content.get("questions"), list):
        raise UserError(f"{path} must hold a list called questions")
    split = str(content.get("data_subtype") or _split_of(path)).replace("test-dev", "test")
    inside = path.parent / split
    images = existing_folder(source.images or (inside if inside.is_dir() else path.parent))
    records = ((f"{path}, record {n}", r) for n, r in enumerate(content["questions"], 1))
    return questions_from(records, lambda record: [annotate(_question(record, images, split))], bad)


def _questions_file(source: Source) -> Path:
    if not source.path.is_dir():
        return existing_file(source.path)
    split = source.split or SPLIT
    files = find_files(source.path, f"*_{split}_questions.json")
    if not files:
        raise UserError(f"{source.path} holds no file such as v2_OpenEnded_mscoco_{split}_"
                        "questions.json")  # fmt: skip
    return files[0]


def _split_of(path: Path) -> str:
    match = _SPLIT_NAME.search(path.name)
    return match.group(1) if match else SPLIT


def _question(record: Any, images: Path, split: str) -> Question:
    if not isinstance(record, dict):
        raise RecordError("this is not a JSON object")
    image = id_field(record, "image_id")
    return Question(
        id=id_field(record, "question_id"),
        text=(text := f"{text_field(record, 'question')}\n{ONE_WORD}"),
        answers=(),
        image=image_file(images, f"COCO_{split}_{image.zfill(12)}.jpg"),
        record={"question_id": record["question_id"], "prompt": text},
    )


def _annotations(path: Path) -> dict[str, dict[str, Any]] | None:
    """From a question's id to its annotation; None where no annotations lie beside."""
    if not (file := annotation_file(path, f"*_{_split_of(path)}_annotations.json")):
        return None
    annotations = load_json(file, dict).get("annotations")
    if not isinstance(annotations, list) or not all(isinstance(a, dict) for a in annotations):
        raise UserError(f"{file} must hold a list of objects called annotations")
    return {str(annotation.get("question_id")): annotation for annotation in annotations}


def _annotated(annotations: dict[str, dict[str, Any]], question: Question) -> Question:
    if (annotation := annotations.get(question.id)) is None:
        raise RecordError("there is no annotation of this question")
    people = annotation.get("answers")
    if not isinstance(people, list) or not people:
        raise RecordError("its annotation has no answers")
    if not all(isinstance(one, dict) and isinstance(one.get("answer"), str) for one in people):
        raise RecordError("an answer of its annotation is not a text")
    answers = [without_breaks(one["answer"]) for one in people]
    return replace(
        question,
        answers=tuple(answer for answer, _ in Counter(answers).most_common()),
        kind=optional_field(annotation, "answer_type", "all"),
        scoring_data=tuple(answers),
    )


def score(question: Question, response: str) -> float:
    """The authors' accuracy of a response as it is handed in, 0 to 1."""
    response, answers = normalise(response), list(question.scoring_data)
    if len(set(answers)) > 1:
        answers, response = [*map(_compared_form, answers)], _compared_form(response)
    m, n = answers.count(response), len(answers)
    left_out = [m - (answer == response) for answer in answers]
    return sum(min(1.0, others / FEWEST_AGREEING) for others in left_out) / n


@lru_cache(maxsize=REMEMBERED)
def _compared_form(answer: str) -> str:
    return by_words(without_punctuation(answer))


def upload(questions: list[Question], responses: list[str], source: Source) -> dict[str, bytes]:
    """The JSON list that the authors' script and server read."""
    answers = {
        q.id: {"question_id": (q.record or {})["question_id"], "answer": normalise(response)}
        for q, response in zip(questions, responses, strict=True)
    }
    path = _questions_file(source)
    if "test" in path.name:
        for question_id in _test_ids(path):
            empty = {"question_id": question_id, "answer": ""}
            answers.setdefault(str(question_id), empty)
    return {".json": json.dumps([*answers.values()]).encode()}


def _test_ids(path: Path) -> Iterator[int | str]:
    """The ids of all questions of test2015, if a file of them lies beside."""
    if file := annotation_file(path, "llava_vqav2_mscoco_test2015.jsonl"):
        yield from (record["question_id"] for record in json_lines(file))
    elif file := annotation_file(path, "*mscoco_test2015_questions.json"):
        for record in load_json(file, dict).get("questions", ()):
            yield record["question_id"]
