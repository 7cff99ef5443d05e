"""The result of an evaluation as the JSON of `--out`: figures, texts, machine and versions."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

from tqdm import tqdm

from ..checkpoints.reading.weights import weight_files
from ..machine.hardware import describe_machine, versions
from ..machine.user_cache import model_key
from .alike import alike_methods
from .budgeted_methods import random_baselines
from .evaluation_run import EvaluationRun
from .first_token import measure_first_tokens
from .judge import AnswerTable, Judge
from .question_set import QuestionSet
from .questions import BadRecords, ClipFile, Picture, Question, have_clips
from .result_file import BUILT_IN, question_set_key

GIVEN = ("num_draft_tokens", "max_pixels")  # options that are told where they are given
MOST_RESPONSES = 50_000  # whose texts are kept if nothing else is said: a few MB


def first_token_rows(
    evaluation: EvaluationRun, model: Any, processor: Any, args: argparse.Namespace
) -> list[dict[str, float]]:
    """The times to the first token of each working method, for the first questions that were
    answered, as many as `args.first_token`."""
    answered = {n for line in evaluation.full_lines for n in line.numbers}
    reread = enumerate(evaluation.question_set.read(BadRecords(skip=True)))
    questions = [*islice((q for n, q in reread if n in answered), args.first_token)]
    if not questions:
        return []
    options = {"num_draft_tokens": args.num_draft_tokens, "max_pixels": args.max_pixels}
    return measure_first_tokens(model, processor, questions, evaluation.working_methods, options)


def about_run(
    args: argparse.Namespace, folder: Path, question_set: QuestionSet
) -> dict[str, Any]:  # fmt: skip
    """What a result says of its model and its questions."""
    return {
        "questions": question_set.name,
        "format": question_set.format.name,
        "question_set": question_set_key(question_set.format.name, question_set.name),
        "model": args.model or BUILT_IN,
        "model_key": model_key(folder),
        **({"adapter_path": args.adapter_path} if args.adapter_path else {}),
    }


def is_evidence(args: argparse.Namespace, evaluation: EvaluationRun) -> bool:
    """Whether `advise` and `auto` may go by the result: it has shares of right answers about
    pictures, by the model alone."""
    has_shares = evaluation.is_scored and evaluation.question_set.format.unit == "%"
    is_changed = args.adapter_path or args.positions
    return has_shares and not is_changed and not have_clips(evaluation.questions)


def result_of(
    args: argparse.Namespace, about: Mapping[str, Any], evaluation: EvaluationRun,
    unread: list[str], refused: list[dict], folder: Path,
    first_tokens: Sequence[dict[str, float]] = (),
) -> dict[str, Any]:  # fmt: skip
    """The content of --out; `about` is what `about_run` says."""
    answers, skipped = evaluation.collect()
    format = evaluation.question_set.format
    judge = Judge(format, answers.questions, args.seed)
    methods = evaluation.working_methods
    figures = judge.rows(answers, 0, random_baselines(methods))
    rows = [
        method.columns(evaluation.sizes) | row for method, row in zip(methods, figures, strict=True)
    ]
    _add_columns(rows, evaluation, answers, first_tokens)
    alike = alike_methods(methods, answers, evaluation.sizes)
    return {
        "command": "evaluate",
        **about,
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        **{name: value for name in GIVEN if (value := getattr(args, name))},
        **({"metric": format.metric} if format.metric else {}),
        "count": len(answers.questions),
        "kinds": {kind: sum(q.kind == kind for q in answers.questions) for kind in judge.kinds},
        "unit": format.unit,
        "seed": args.seed,
        "max_tokens": args.max_tokens,
        "majority": judge.majority(),
        "machine": describe_machine(),
        "versions": versions(),
        "seconds": round(sum(line.seconds for line in evaluation.lines), 1),
        "megabytes": weights_megabytes(folder),
        "rows": rows,
        **({"alike": alike} if alike else {}),
        "refused": refused + evaluation.refusals(),
        "skipped": unread + skipped,
        **({"texts": texts_of(answers)} if keeps_texts(args.texts, answers) else {}),
    }


def _add_columns(
    rows: list[dict[str, Any]], evaluation: EvaluationRun, answers: AnswerTable,
    first_tokens: Sequence[dict[str, float]],
) -> None:  # fmt: skip
    """Add to each row what is not judged alone: comparisons with full, drafts and times."""
    format, responses_PQ = evaluation.question_set.format, answers.responses_PQ
    bar = tqdm(rows, desc="comparing with full", file=sys.stderr, delay=2, leave=False)
    for i, (row, p) in enumerate(zip(bar, evaluation.working, strict=True)):
        if to_full := format.figures_to_full(responses_PQ[i], responses_PQ[0]):
            rounded = {name: round(value, 4) for name, value in to_full.items()}
            row["more"] = row.get("more", {}) | rounded
        if evaluation.lines[-1].drafts:
            row["drafts"] = evaluation.answers[p].drafts.columns()
        if kept := evaluation.answers[p].kept:
            row["kept"] = round(fmean(kept), 1)
        if first_tokens:
            row["first_token_ms"] = first_tokens[i]


def keeps_texts(texts: bool | None, answers: AnswerTable) -> bool:
    """Whether texts are kept: as the user says, else if there are not too many."""
    responses = len(answers.questions) * len(answers.responses_PQ)
    return responses <= MOST_RESPONSES if texts is None else texts


def texts_of(answers: AnswerTable) -> list[dict[str, Any]]:
    """Every question with its right answers, and the responses in the order of the rows."""
    return [
        {
            "id": question.id,
            "question": question.text,
            "image": image_name(question.image),
            **more_images(question),
            "answers": [*question.answers],
            "responses": [responses[n] for responses in answers.responses_PQ],
        }
        for n, question in enumerate(answers.questions)
    ]


def image_name(image: Picture) -> str | None:
    """A picture's or a clip's file; of a picture inside the question file its SHA-256; of a drawn
    one the scene."""
    if isinstance(image, ClipFile):
        return image.path.name
    if isinstance(image, Path):
        return image.name
    if isinstance(image, bytes):
        return f"sha256:{image.hex()}"
    name: str | None = getattr(image, "name", None)
    return name


def more_images(question: Question) -> dict[str, list[str | None]]:
    """The names of the pictures behind the first, of a question about several."""
    names = [*map(image_name, question.more_images)]
    return {"more_images": names} if names else {}


def weights_megabytes(folder: Path) -> float:
    """The size of a model's weights in MB."""
    return round(sum(file.stat().st_size for file in weight_files(folder)) / 1e6, 2)
