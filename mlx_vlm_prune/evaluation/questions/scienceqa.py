"""ScienceQA (arXiv:2209.09513): school questions with two to five choices.

Reads the published folder: problems.json, pid_splits.json and the images, which lie under
SPLIT/ID/image.png in the images' folder, else in the subfolder `images`, else in the folder. Only
questions with an image are asked (IMG in published tables), of split test unless another is named.
The kind is `subject`. The question comes first, then its hint as context, then the choices and the
usual suffix that asks for the letter.

The usual rule (LLaVA's, arXiv:2304.08485): the response is a letter, begins with "B. ", or says
once "The answer is B." We also take "B." alone, and a missing last full stop. Where none of these
holds LLaVA's script guesses at random; here the response is wrong.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...checkpoints.errors import UserError
from . import BadRecords, Question, Source
from .records import (
    RecordError,
    existing_folder,
    image_file,
    load_json,
    optional_field,
    questions_from,
    text_field,
    text_list_field,
)
from .shared_rules import LETTERS, ONE_LETTER, lettered_options

SPLIT = "test"
MOST_CHOICES = 5
_LETTER = re.compile(r"([A-E])(\.?$|\. )")
_SENTENCE = re.compile(r"The answer is ([A-E])\b")


def read(source: Source, bad: BadRecords) -> Iterator[Question]:
    """The questions of a folder. Raises UserError where a file, folder or split is missing."""
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


def chosen_letter(response: str) -> str:
    """The letter that a response names, or "" where it names none."""
    response = response.strip()
    if match := _LETTER.match(response):
        return match.group(1)
    letters = _SENTENCE.findall(response)
    return letters[0] if len(letters) == 1 else ""


def score(question: Question, response: str) -> float:
    """1 where the response names the right letter, else 0."""
    return float(chosen_letter(response) == question.answers[0])
