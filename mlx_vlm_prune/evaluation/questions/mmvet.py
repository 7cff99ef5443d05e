"""MM-Vet, 218 questions that take several abilities at once (arXiv:2308.02490).

Reads the published mm-vet.json (of a folder this file): an object from "v1_0" … to `imagename`,
`question`, `answer` and `capability`; images lie in `images` or beside. Also LLaVA's prepared
llava-mm-vet.jsonl, with mm-vet.json beside or in `mm-vet`. Nothing is added to the question. The
kind is the set of its capabilities.

The authors' rule: a language model grades each response from 0 to 1, given examples, the question
and the right answer (`judge_url` and `judge_model`; GPT-4 in published tables, and grades of
other models do not compare with those). A grade that is no number is asked for again, at a rising
temperature, and is 0 after the fifth. `upload` is the file that their own evaluation reads.

GRADING is their prompt, word by word, since grades depend on it: from mm-vet_evaluator.py of
github.com/yuweihao/MM-Vet@acde843, under the Apache License 2.0, whose text is in LICENSE.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...checkpoints.errors import UserError
from . import BadRecords, Question, Source
from .prepared import Annotate, annotation_file, is_prepared, read_prepared
from .records import (
    RecordError,
    image_file,
    load_json,
    questions_from_json,
    text_field,
    text_list_field,
)

LEAST_TOKENS = 512
_ICELAND = (
    "Can you explain this meme? | This meme is poking fun at the fact that the names of the"
    " countries Iceland and Greenland are misleading. Despite its name, Iceland is known for its"
    " beautiful green landscapes, while Greenland is mostly covered in ice and snow. The meme is"
    " saying that the person has trust issues because the names of these countries do not"
    " accurately represent their landscapes. |"
)
GRADING = f"""Compare the ground truth and prediction from AI models, to give a correctness score \
for the prediction. <AND> in the ground truth means it is totally right only when all elements in \
the ground truth are present in the prediction, and <OR> means it is totally right when any one \
element in the ground truth is present in the prediction. The correctness score is 0.0 (totally \
wrong), 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, or 1.0 (totally right). Just complete the \
last space of the correctness score.

Question | Ground truth | Prediction | Correctness
--- | --- | --- | ---
What is x in the equation? | -1 <AND> -5 | x = 3 | 0.0
What is x in the equation? | -1 <AND> -5 | x = -1 | 0.5
What is x in the equation? | -1 <AND> -5 | x = -5 | 0.5
What is x in the equation? | -1 <AND> -5 | x = -5 or 5 | 0.5
What is x in the equation? | -1 <AND> -5 | x = -1 or x = -5 | 1.0
{_ICELAND} The meme talks about Iceland and Greenland. It's pointing out that despite their names, \
Iceland is not very icy and Greenland isn't very green. | 0.4
{_ICELAND} The meme is using humor to point out the misleading nature of Iceland's and \
Greenland's names. Iceland, despite its name, has lush green landscapes while Greenland is mostly \
covered in ice and snow. The text 'This is why I have trust issues' is a playful way to suggest \
that these contradictions can lead to distrust or confusion. The humor in this meme is derived \
from the unexpected contrast between the names of the countries and their actual physical \
characteristics. | 1.0
"""
AGAIN = "\nPredict the correctness of the answer (digit): "


def read(source: Source, bad: BadRecords) -> Iterator[Question]:
    """The questions of a file or folder. Raises UserError where either is missing."""
    path = source.path / "mm-vet.json" if source.path.is_dir() else source.path
    if is_prepared(path):
        return read_prepared(source, bad, "images", _annotate(path))
    inside = path.parent / "images"
    images = source.images or (inside if inside.is_dir() else path.parent)
    return questions_from_json(
        replace(source, path=path, images=images), bad, load_json(path, dict), _questions
    )


def _questions(name: str, record: dict[str, Any], images: Path) -> Iterator[Question]:
    image = image_file(images, text_field(record, "imagename"))
    yield _annotated(Question(name, text_field(record, "question"), (), image), record)


def _annotate(path: Path) -> Annotate:
    """What adds the right answers to LLaVA's questions, whose ids are those without "v1_"."""
    file = annotation_file(path, "mm-vet.json", "mm-vet/mm-vet.json")
    records = load_json(file, dict) if file else {}

    def annotate(question: Question) -> Question:
        question = replace(question, id=f"v1_{question.id}")
        if not file:
            return question
        if not isinstance(record := records.get(question.id), dict):
            raise RecordError(f"{file} has no {question.id}")
        return _annotated(question, record)

    return annotate


def _annotated(question: Question, record: dict[str, Any]) -> Question:
    answer, abilities = text_field(record, "answer"), text_list_field(record, "capability")
    one = answer.split("<OR>")[0].replace("<AND>", ", ").strip()
    return replace(
        question,
        answers=(one or answer,),
        kind="_".join(sorted(set(abilities))),
        scoring_data=(question.text, answer),
    )


def grade_prompt(question: Question, response: str, again: bool = False) -> str:
    """What the language model is asked; `again` after a reply that was no grade."""
    text, answer = question.scoring_data
    answer = answer.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    return GRADING + "\n" + " | ".join([text, answer, response, ""]) + (AGAIN if again else "")


def parse_grade(reply: str) -> float | None:
    """The grade in a language model's reply, 0 to 1, or None."""
    try:
        grade = float(reply.split(" ")[0].strip())
    except ValueError:
        return None
    return grade if 0 <= grade <= 1 else None


def score(question: Question, response: str) -> float:
    """Only a language model's grade counts. Raises UserError."""
    raise UserError("MM-Vet is scored by a language model: give judge_url and judge_model")


def extra_figures(
    questions: list[Question], responses: list[str], scores: list[float]
) -> dict[str, float]:
    """The mean grade of the questions that need a capability, in %."""
    grades: dict[str, list[float]] = {}
    for question, grade in zip(questions, scores, strict=True):
        for ability in question.kind.split("_"):
            grades.setdefault(ability, []).append(grade)
    ordered = sorted(grades, key=lambda ability: (-len(grades[ability]), ability))
    return {ability: 100 * sum(grades[ability]) / len(grades[ability]) for ability in ordered}


def upload(questions: list[Question], responses: list[str], source: Source) -> dict[str, bytes]:
    """What the authors' evaluation reads: from "v1_0" … to the response."""
    answers = {q.id: response for q, response in zip(questions, responses, strict=True)}
    return {".json": json.dumps(answers, indent=2, ensure_ascii=False).encode()}
