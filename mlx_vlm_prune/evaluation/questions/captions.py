"""Captions in COCO's format (arXiv:1504.00325), as fastvlm-token-pruning evaluates them.

Reads the published annotations, such as captions_val2017.json: `images` with `id` and `file_name`,
and `annotations` with `image_id` and `caption`. Every image is a question, with
fastvlm-token-pruning's prompt; all its captions are right answers.

A response's score is CIDEr-D by pycocoevalcap's rule, see caption_rules.py, and the overall figure
100 times its mean, as papers print it. Document frequencies come from the references of the images
that were asked. A response that is much longer than the references, as of a model that was trained
to describe at length, scores near 0. Beside it ROUGE-L, in %: with the references, and of each
method with the full model's own caption. fastvlm-token-pruning takes the cosine of a sentence
encoder, all-MiniLM-L6-v2, in place of both, whose weights are no part of this package.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ...checkpoints.errors import UserError
from . import BadRecords, Question, Source, mean
from .caption_rules import DocumentFrequencies, References, rouge_l, words
from .records import RecordError, id_field, image_file, load_json, questions_from_json, text_field

PROMPT = "Describe this image concisely."
METRIC, SCALE, UNIT = "CIDEr", 100.0, ""


def read(source: Source, bad: BadRecords) -> Iterator[Question]:
    """The questions of a JSON file. Raises UserError where it or the images' folder is missing."""
    content = load_json(source.path, dict)
    for name in ("images", "annotations"):
        if not isinstance(content.get(name), list):
            raise UserError(f"{source.path} must hold a list called {name}")
    captions = _captions_by_image(content["annotations"], source.path, bad)
    return questions_from_json(source, bad, content["images"], partial(_questions, captions))


def _captions_by_image(annotations: list[Any], path: Path, bad: BadRecords) -> dict[str, list[str]]:
    captions: dict[str, list[str]] = {}
    for number, record in enumerate(annotations, 1):
        try:
            if not isinstance(record, dict):
                raise RecordError("this is not a JSON object")
            image_id, caption = id_field(record, "image_id"), text_field(record, "caption")
        except RecordError as fault:
            bad.report(f"{path}, annotation {number}", str(fault))
            continue
        captions.setdefault(image_id, []).append(caption)
    return captions


def _questions(
    captions: dict[str, list[str]], number: str, record: dict[str, Any], images: Path
) -> Iterator[Question]:
    image_id = id_field(record, "id")
    if image_id not in captions:
        raise RecordError(f"no annotation has image_id {image_id}")
    image = image_file(images, text_field(record, "file_name"))
    yield Question(image_id, PROMPT, tuple(captions[image_id]), image)


def prepare_scoring(questions: Sequence[Question]) -> list[Question]:
    """The same questions, whose scores know the references of all of them."""
    captions = [tuple(tuple(words(answer)) for answer in q.answers) for q in questions]
    frequencies = DocumentFrequencies.of(captions)
    return [
        replace(question, scoring_data=References(references, frequencies))
        for question, references in zip(questions, captions, strict=True)
    ]


def score(question: Question, response: str) -> float:
    """CIDEr-D among the questions given to `prepare_scoring`, 0 to 10."""
    references: References = question.scoring_data
    return references.cider(words(response))


def extra_figures(
    questions: list[Question], responses: list[str], scores: list[float]
) -> dict[str, float]:
    """ROUGE-L with the references, in %."""
    pairs = zip(questions, responses, strict=True)
    return {"ROUGE-L": 100 * mean([rouge_l(words(r), q.scoring_data.captions) for q, r in pairs])}


def upload(
    questions: Sequence[Question], responses: Sequence[str], source: Source
) -> dict[str, bytes]:
    """COCO's file of results, which pycocoevalcap and COCO's server read."""
    results = [
        {"image_id": int(q.id) if q.id.isdecimal() else q.id, "caption": response}
        for q, response in zip(questions, responses, strict=True)
    ]
    return {".json": json.dumps(results, ensure_ascii=False).encode()}


def figures_to_full(responses: Sequence[str], full: Sequence[str]) -> dict[str, float]:
    """ROUGE-L with the full model's captions as the only references, in %."""
    pairs = zip(responses, full, strict=True)
    return {"ROUGE-L full": 100 * mean([rouge_l(words(r), [words(f)]) for r, f in pairs])}
