"""Rows of an earlier result in the table of this run: `evaluate --compare-with FILE.json`.

A new method is compared with all others in minutes: it alone is asked, and the others' figures come
from the file. They are comparable only where the model, the questions and the scoring are the same,
and where full answers as it did then. Both are checked.
"""

import argparse
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..checkpoints.errors import UserError
from ..checkpoints.reading.files import read_json
from .merging import method_key, read_evaluation

logger = logging.getLogger("mlx_vlm_prune")
SAME = ("model_key", "adapter_path", "format", "question_set", "seed", "max_tokens", "max_pixels",
    "num_draft_tokens")  # fmt: skip
SAME_QUESTIONS = ("count", "kinds", "unit")
MEASURED = ("date", "machine", "versions")  # of each file whose rows are taken
NOT_COMPARED = ("first_token_ms", "drafts")  # of the rows: they hold times


def check_comparable(args: argparse.Namespace, about: Mapping[str, Any], count: int) -> None:
    """Raises UserError where `args.compare_with` is no result, or one of another model, other
    options or other questions. `about` is what this run's result will say of model and questions,
    of which there are `count`."""
    path: Path | None = args.compare_with
    if path is None:
        return
    earlier = read_evaluation(path).content
    _check_same(path, earlier, {**vars(args), **about}, SAME)
    if count < earlier["count"]:
        raise UserError(
            f"{path} has {earlier['count']} questions, and this run {count}; it must ask as many"
        )


def _check_same(
    path: Path, earlier: Mapping[str, Any], result: Mapping[str, Any], names: Iterable[str]
) -> None:
    for name in names:
        if (then := earlier.get(name)) != (now := result.get(name)):
            raise UserError(
                f"{path} cannot be compared with this run: its {name} is {then!r}, here {now!r}"
            )


def with_earlier_rows(result: dict[str, Any], path: Path | None) -> dict[str, Any]:
    """`result` with the rows of `path` that it lacks, and `earlier`, which says where those are
    from. If full no longer answers as it did in `path`, a warning says so, and `result`
    stays as it is."""
    if path is None:
        return result
    earlier = read_json(path, most=None)
    full, full_then = result["rows"][0], earlier["rows"][0]
    try:
        _check_same(path, earlier, result, SAME_QUESTIONS)
        figures = sorted((full.keys() | full_then.keys()) - {*NOT_COMPARED})
        _check_same(path, full_then, full, figures)
    except UserError as e:
        logger.warning("%s; the result has the rows of this run alone", e)
        return result
    measured = {method_key(row) for row in result["rows"]}
    taken = [row for row in earlier["rows"] if method_key(row) not in measured]
    refused = [one for one in earlier["refused"] if one not in result["refused"]]
    source = {
        "file": path.name,
        "rows": len(taken),
        **{name: earlier[name] for name in MEASURED if name in earlier},
    }
    return {
        **result,
        "seconds": round(result["seconds"] + earlier["seconds"], 1),
        "rows": [*result["rows"], *taken],
        "alike": result.get("alike", []) + earlier.get("alike", []),
        "refused": result["refused"] + refused,
        "earlier": [source, *earlier.get("earlier", [])],
    }
