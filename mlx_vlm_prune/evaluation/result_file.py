"""Where an evaluation's result goes: named after model and questions, never over another's."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checkpoints.errors import UserError
from ..checkpoints.reading.files import read_json
from .budgeted_methods import BudgetedMethod
from .questions import DRAWN

ADVICE = "name another file with --out"
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
    try:
        existing = read_json(path, most=None)
        questions, model = int(existing["count"]), str(existing["model"])
        set_key = existing.get("question_set") or question_set_key(
            existing["format"], existing["questions"]
        )
        existing["rows"][0]["pruner"]
    except (UserError, KeyError, IndexError, TypeError, ValueError):
        raise UserError(f"{path} is no result of evaluate; {ADVICE}") from None
    by = "model_key" if "model_key" in existing else "model"
    if any(existing.get(name) != about.get(name) for name in (by, "adapter_path")):
        other = f"other weights of {model}" if model == about["model"] else model
        raise UserError(f"{path} is of {other}; {ADVICE}")
    if set_key != about["question_set"]:
        raise UserError(f"{path} is of other questions, {existing['questions']}; {ADVICE}")
    if questions > count:
        raise UserError(f"{path} has {questions} questions, and this run {count}; {ADVICE}")


def check_has_methods(path: Path, methods: Sequence[BudgetedMethod]) -> None:
    """Raises UserError where the result in `path` has a method, a budget or a policy of positions
    that this run does not ask."""
    if not path.exists():
        return
    pairs = {(method.spec, method.K, method.pipeline.policy) for method in methods}
    for row in read_json(path, most=None)["rows"][1:]:  # the first is full
        K = row.get("keep_ratio", row.get("keep_tokens", row.get("tokens")))
        spec, policy = row.get("pruner"), row.get("positions")
        if (spec, K, policy) not in pairs:
            budget = f"{K} tokens" if isinstance(K, int) else f"a share of {K:g}"
            positions = f" and positions {policy}" if policy else ""
            raise UserError(
                f"{path} has {spec} with {budget}{positions}, which this run does not ask; {ADVICE}"
            )
