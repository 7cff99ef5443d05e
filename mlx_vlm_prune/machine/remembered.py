"""The evaluations that `advise` and `auto` trust: in the cache, the largest of each question set.

A file is named after the model's key and the question set's.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..checkpoints.errors import UserError
from ..checkpoints.reading.files import read_json
from .user_cache import cache_folder, model_key, write_cached

FOLDER = "evaluations"
FEWEST = 20  # questions; of fewer an evaluation says nothing


def remember(folder: Path, result: Mapping[str, Any]) -> None:
    """Keep a result of the model in `folder`, unless there is a larger one of the same questions.

    Where the cache cannot be written, nothing is kept.
    """
    path = cache_folder() / FOLDER / f"{model_key(folder)}-{result['question_set']}.json"
    with suppress(UserError):  # the result itself is written
        if _size(path) <= (result["count"], len(result["rows"])):
            write_cached(path, json.dumps(result, indent=4, ensure_ascii=False) + "\n")


def remembered(folder: Path) -> list[Path]:
    """The evaluations kept of the model in `folder`, the largest first."""
    return sorted(remembered_files(folder), key=_size, reverse=True)


def remembered_files(folder: Path) -> list[Path]:
    """The same in no order, for which no file is read."""
    return [*(cache_folder() / FOLDER).glob(f"{model_key(folder)}*.json")]


def _size(path: Path) -> tuple[int, int]:
    """Questions and rows of a result; none where there is none, or it cannot be read."""
    with suppress(UserError, KeyError, TypeError, ValueError):
        result = read_json(path, most=None)
        return int(result["count"]), len(result["rows"])
    return 0, 0
