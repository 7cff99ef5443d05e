"""ScienceQA (arXiv:2209.09513): school questions with two to five choices.

Reads the published folder: problems.json, pid_splits.json and the images, which lie under
SPLIT/ID/image.png in the images' folder, else in the subfolder `images`, else in the folder. Only
questions with an image are asked (IMG in published tables), of split test unless another is named.
The kind is `subject`. The question comes first, then its hint as context, then the choices and the
usual suffix that asks for the letter.

The usual rule (LLaVA's, arXiv:2304.08485): the response is a letter, begins with "B. ", or says
once "The answer is B." We also take "B." alone, and a missing last full stop. Where none of these
holds the response is wrong.

LLaVA's prepared llava_test_CQM-A.json is read too: a list of conversations, with problems.json
beside for the subjects. Its questions are LLaVA's prompts, and only LLaVA's three forms count.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...checkpoints.errors import UserError
from . import BadRecords, Question, Source
from .llava import IMAGE_MARK, question_answer_pairs
from .prepared import annotation_file, is_prepared, prepared_images
from .records import (
    RecordError,
    existing_folder,
    id_field,
    image_file,
    load_json,
    optional_field,
    questions_from,
    questions_from_json,
    text_field,
    text_list_field,
)
from .shared_rules import LETTERS, ONE_LETTER, lettered_options

SPLIT = "test"
MOST_CHOICES = 5
_LETTER = re.compile(r"([A-E])(\.?$|\. )")
PUBLISHED = "published"  # the rule of LLaVA's script for its prepared questions
_PUBLISHED_SENTENCE = re.compile(r"The answer is ([A-Z]).")  # any sign may follow, as published
_SENTENCE = re.compile(r"The answer is ([A-E])\b")


def read(source: Source, bad: BadRecords) -> Iterator[Question]:
    """The questions of a folder. Raises UserError where a file, folder or split is missing."""
    if is_prepared(source.path):
        return _prepared(source, bad)
    folder = existing_folder(source.path if source.path.is_dir() else source.path.parent)
    problems = load_json(folder / "problems.json", dict)
    splits = load_json(folder / "pid_splits.json", dict)
    split = source.split or SPLIT
    if not isinstance(splits.get(split), list):
        raise UserError(f"{folder} has no split {split!r}; there are {', '.join(splits)}")
    if not all(isinstance(pid, str) for pid in splits[split]):
        raise UserError(f"{folder / 'pid_splits.json'} must hold lists of texts")
    inside = folder / "images"
    images = existing_folder(source.images or (inside if inside.is_dir() else folder))
    numbered = ((f"{folder}, question {pid}", pid) for pid in splits[split])
    return questions_from(
        numbered, lambda pid: _questions(pid, problems.get(pid), images, split), bad
    )


def _questions(pid: str, problem: Any, images: Path, split: str) -> list[Question]:
    if not isinstance(problem, dict):
        raise RecordError("problems.json has no such question")
    if not problem.get("image"):
        return []
    choices, right = text_list_field(problem, "choices"), problem.get("answer")
    if len(choices) > MOST_CHOICES:
        raise RecordError(f"there are {len(choices)} choices; at most {MOST_CHOICES} have a letter")
    if isinstance(right, bool) or not isinstance(right, int) or not 0 <= right < len(choices):
        raise RecordError(f"answer is not the number of a choice, 0 to {len(choices) - 1}")
    hint = optional_field(problem, "hint", "")
    context = f"Context: {hint}\n" if hint else ""
    text = f"{text_field(problem, 'question')}\n{context}{lettered_options(choices)}\n{ONE_LETTER}"
    image_split = optional_field(problem, "split", split)  # minitest lies among the images of test
    image = image_file(images / image_split / pid, text_field(problem, "image"))
    kind = optional_field(problem, "subject", "all")
    return [Question(pid, text, (LETTERS[right],), image, kind)]


def _prepared(source: Source, bad: BadRecords) -> Iterator[Question]:
    records = load_json(source.path, list)
    images = prepared_images(source, f"images/{SPLIT}")
    file = annotation_file(source.path, "problems.json")
    problems = load_json(file, dict) if file else {}

    def questions(number: str, record: dict[str, Any], images: Path) -> list[Question]:
        if "image" not in record:
            return []
        turns = question_answer_pairs(
            record.get("conversations"), "from", "value", ("human", "gpt")
        )
        return [_prepared_question(record, *turns[0], problems, images)]

    return questions_from_json(Source(source.path, images), bad, records, questions)


def _prepared_question(
    record: dict[str, Any], text: str, reply: str, problems: dict[str, Any], images: Path
) -> Question:
    name, text = id_field(record, "id"), f"{text}\n{ONE_LETTER}"
    if not (match := _SENTENCE.search(reply)):
        raise RecordError('its reply does not say "The answer is" and a letter')
    problem = problems.get(name)
    return Question(
        id=name,
        text=text,
        answers=(match.group(1),),
        image=image_file(images, text_field(record, "image")),
        kind=optional_field(problem, "subject", "all") if isinstance(problem, dict) else "all",
        scoring_data=PUBLISHED,
        record={"question_id": record["id"], "prompt": f"{IMAGE_MARK}\n{text}"},
    )


def published_letter(response: str) -> str:
    """The letter that a response names by LLaVA's script, or "" where it names none."""
    if response[:1] in tuple("ABCDE") and (len(response) == 1 or response[1:3] == ". "):
        return response[0]
    letters = _PUBLISHED_SENTENCE.findall(response)
    return letters[0] if len(letters) == 1 else ""


def chosen_letter(response: str) -> str:
    """The letter that a response names, or "" where it names none."""
    response = response.strip()
    if match := _LETTER.match(response):
        return match.group(1)
    letters = _SENTENCE.findall(response)
    return letters[0] if len(letters) == 1 else ""


def score(question: Question, response: str) -> float:
    """1 where the response names the right letter, else 0."""
    is_published = question.scoring_data == PUBLISHED
    letter = published_letter(response.strip()) if is_published else chosen_letter(response)
    return float(letter == question.answers[0])
