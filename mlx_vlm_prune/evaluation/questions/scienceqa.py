"""ScienceQA (arXiv:2209.09513): school questions with two to five choices.

Read is the published folder: problems.json, pid_splits.json and the images, which lie under
SPLIT/ID/image.png in the images' folder, else in the folder's own `images`, else in itself. Only
questions with an image are asked (IMG in the field's tables), of split test unless another is
named. The kind is `subject`. The question comes first, then its hint as context, then the choices
and the field's suffix that asks for the letter.

The rule that the field follows (LLaVA's, arXiv:2304.08485): the answer is a letter, begins with
"B. ", or says once "The answer is B." We also take "B." alone, and a missing last full stop. Where
none holds the authors guess at random; here the answer is wrong.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...checkpoints.errors import UserError
from . import Bad, Question, Source
from .answers import LETTERS, ONE_LETTER, options
from .reading import Fault, each, folder, image_file, optional, text_of, texts_of, whole_json

SPLIT = "test"
MOST = 5
_LETTER = re.compile(r"([A-E])(\.?$|\. )")
_SENTENCE = re.compile(r"The answer is ([A-E])\b")


def read(source: Source, bad: Bad) -> Iterator[Question]:
    """The questions of a folder. Raises UserError where a file, folder or split is missing."""
    home = folder(source.path if source.path.is_dir() else source.path.parent)
    problems = whole_json(home / "problems.json", dict)
    splits = whole_json(home / "pid_splits.json", dict)
    split = source.split or SPLIT
    if not isinstance(splits.get(split), list):
        raise UserError(f"{home} has no split {split!r}; there are {', '.join(splits)}")
    if not all(isinstance(pid, str) for pid in splits[split]):
        raise UserError(f"{home / 'pid_splits.json'} must hold lists of texts")
    inside = home / "images"
    images = folder(source.images or (inside if inside.is_dir() else home))
    named = ((f"{home}, question {pid}", pid) for pid in splits[split])
    return each(named, lambda pid: _questions(pid, problems.get(pid), images, split), bad)


def _questions(pid: str, problem: Any, images: Path, split: str) -> list[Question]:
    if not isinstance(problem, dict):
        raise Fault("problems.json has no such question")
    if not problem.get("image"):
        return []
    choices, right = texts_of(problem, "choices"), problem.get("answer")
    if len(choices) > MOST:
        raise Fault(f"there are {len(choices)} choices; at most {MOST} have a letter")
    if isinstance(right, bool) or not isinstance(right, int) or not 0 <= right < len(choices):
        raise Fault(f"answer is not the number of a choice, 0 to {len(choices) - 1}")
    hint = optional(problem, "hint", "")
    context = f"Context: {hint}\n" if hint else ""
    text = f"{text_of(problem, 'question')}\n{context}{options(choices)}\n{ONE_LETTER}"
    where = optional(problem, "split", split)  # minitest lies among the images of test
    image = image_file(images / where / pid, text_of(problem, "image"))
    kind = optional(problem, "subject", "all")
    return [Question(pid, text, (LETTERS[right],), image, kind)]


def chosen(said: str) -> str:
    """The letter that an answer names, or "" where it names none."""
    said = said.strip()
    if found := _LETTER.match(said):
        return found.group(1)
    told = _SENTENCE.findall(said)
    return told[0] if len(told) == 1 else ""


def score(question: Question, said: str) -> float:
    """1 where the answer names the right letter, else 0."""
    return float(chosen(said) == question.answers[0])
