"""Where an evaluation's result goes: named after model and questions, never over another's."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoints.errors import UserError
from ..checkpoints.reading.files import read_json
from .questions import DRAWN

BUILT_IN = "scenes"  # the built-in model's name


def default_result_path(model: str | None, questions: str) -> Path:
    """`evaluation-MODEL-QUESTIONS.json` in the current folder."""
    names = [Path(model or BUILT_IN).absolute().name, Path(questions).absolute().stem]
    plain = [re.sub(r"[^\w.+-]+", "_", name) for name in names]
    return Path(f"evaluation-{'-'.join(plain)}.json")


def question_set_key(format_name: str, questions: str) -> str:
    """A question set's fingerprint, 8 hexadecimal digits: of its format and where it lies, so that
    it is the same for any number of its questions."""
    lies = questions if questions in DRAWN else str(Path(questions).expanduser().absolute())
    return hashlib.sha256(json.dumps([format_name, lies]).encode()).hexdigest()[:8]


def check_not_anothers(path: Path, about: Mapping[str, Any], count: int) -> None:
    """Raises UserError where `path` holds anything but a result of the same model and question set
    with at most `count` questions. `about` is what a result says of them."""
    if not path.exists():
        return
    advice = "name another file with --out"
    try:
        existing = read_json(path, most=None)
        questions, model = int(existing["count"]), str(existing["model"])
        set_key = existing.get("question_set") or question_set_key(
            existing["format"], existing["questions"]
        )
        existing["rows"][0]["pruner"]
    except (UserError, KeyError, IndexError, TypeError, ValueError):
        raise UserError(f"{path} is no result of evaluate; {advice}") from None
    by = "model_key" if "model_key" in existing else "model"
    if any(existing.get(name) != about.get(name) for name in (by, "adapter_path")):
        other = f"other weights of {model}" if model == about["model"] else model
        raise UserError(f"{path} is of {other}; {advice}")
    if set_key != about["question_set"]:
        raise UserError(f"{path} is of other questions, {existing['questions']}; {advice}")
    if questions > count:
        raise UserError(f"{path} has {questions} questions, and this run {count}; {advice}")
