"""Every method's answers as files for the benchmarks' own evaluation, in LLaVA's layout.

A file for each method holds a line for each question: `question_id`, `prompt`, `text`, `answer_id`,
`model_id`, `metadata`. In the subfolder `upload` lie the files of the same answers that a format's
authors or their server take (`Format.upload`).
"""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

from ..checkpoints.errors import UserError
from ..checkpoints.reading.files import atomic_path, check_target, write_atomically
from .budgeted_methods import BudgetedMethod
from .judge import AnswerTable
from .questions import Format, Question, Source

UPLOAD = "upload"
ID_LETTERS = 22  # of an answer's id


def check_answer_folder(folder: Path) -> None:
    """Raises UserError for a folder that cannot be made or written to."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; the answers need a folder")
    if not folder.exists():
        check_target(folder, replace=False)


def write_answers(
    folder: Path, format: Format, source: Source, model: str,
    methods: Sequence[BudgetedMethod], answers: AnswerTable,
) -> None:  # fmt: skip
    """Write the answers of every method; files of an earlier run are replaced."""
    folder.mkdir(exist_ok=True)
    for name, responses in zip(file_names(methods), answers.responses_PQ, strict=True):
        texts = [response.strip() for response in responses]
        model_id = f"{model}-{name}"
        write_atomically(folder / f"{name}.jsonl", answer_lines(answers.questions, texts, model_id))
        for ending, content in format.upload(answers.questions, texts, source).items():
            target = folder / UPLOAD / f"{name}{ending}"
            target.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(target, replace=True) as beside:
                beside.write_bytes(content)


def answer_lines(questions: Sequence[Question], responses: Sequence[str], model_id: str) -> str:
    """LLaVA's JSON lines. An answer's id is made of the question and the model, so it repeats."""
    lines = []
    for n, (question, response) in enumerate(zip(questions, responses, strict=True)):
        about = question.record or {"question_id": question.id, "prompt": question.text}
        digest = hashlib.sha256(json.dumps([n, question.id, model_id]).encode()).hexdigest()
        line = about | {"text": response, "answer_id": digest[:ID_LETTERS], "model_id": model_id}
        lines.append(json.dumps(line | {"metadata": {}}, ensure_ascii=False) + "\n")
    return "".join(lines)


def file_names(methods: Sequence[BudgetedMethod]) -> list[str]:
    """A file name for each method: the method, its budget and its policy of positions."""
    names: list[str] = []
    for method in methods:
        parts = [method.spec, f"{method.K:g}", *filter(None, [method.pipeline.policy])]
        name = re.sub(r"[^\w.=+-]+", "_", "-".join(parts))
        names.append(name if name not in names else f"{name}-{len(names)}")
    return names
