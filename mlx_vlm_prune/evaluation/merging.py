"""Several evaluations of one model in one table, with the average relative percentage.

As TwigVLM's tables have it (arXiv:2503.14075, their column Rel.): on every question set a method's
figure in percent of the full model's there; then the mean over the sets, each of which counts the
same. Results of `evaluate` are merged as they are, so accuracy, MME's sum and CIDEr can be mixed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..checkpoints.errors import UserError
from ..checkpoints.reading.files import read_json
from ..machine.hardware import describe_machine, versions
from .table import label

EVALUATE = "mlx-vlm-prune evaluate"
FULL = "none"
MethodKey = tuple[str, str, float]  # spec, policy of positions, tokens or share


@dataclass(frozen=True)
class SetEvaluation:
    """A result of `evaluate` on one question set: its rows by method, budget and policy of
    positions, full apart; `name` is its column's."""

    path: Path
    content: dict[str, Any]
    full: float  # the overall figure with all tokens
    rows: dict[MethodKey, dict[str, Any]]
    name: str = ""


def read_evaluation(path: Path) -> SetEvaluation:
    """A result. Raises UserError for a file that is none, or where full scored 0."""
    content = read_json(path, most=None)
    try:
        for name in ("questions", "format", "model", "unit"):
            str(content[name])
        int(content["count"])
        if not any("overall" in row for row in content["rows"]):
            raise UserError(
                f"{path}: its answers were not scored, so there is no figure to average"
            )
        rows = {method_key(row): row for row in content["rows"] if row["pruner"] != FULL}
        full = next(float(row["overall"]) for row in content["rows"] if row["pruner"] == FULL)
        for row in rows.values():
            float(row["overall"]), int(row["tokens"]), int(row["of"])
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, StopIteration) as e:
        raise UserError(f"{path} is no evaluation ({e!r}); {EVALUATE} writes one") from None
    if full <= 0:
        raise UserError(
            f"{path}: with all tokens the model scores {full:g} on {content['questions']}, so"
            " nothing can be given in percent of it"
        )
    return SetEvaluation(path, content, full, rows)


def method_key(row: Mapping[str, Any]) -> MethodKey:
    """What tells a row of a result from the others."""
    K = row["keep_ratio"] if "keep_ratio" in row else row.get("keep_tokens", row["tokens"])
    return str(row["pruner"]), str(row.get("positions", "")), K


def read_evaluations(paths: Sequence[Path]) -> list[SetEvaluation]:
    """Results of one model on different sets, each with a name for its column. Raises UserError."""
    evaluations = [read_evaluation(path) for path in paths]
    first, *others = evaluations
    for other in others:
        if not _is_same_model(first.content, other.content):
            raise UserError(
                f"{first.path} is of {_model(first.content)}, and {other.path} of"
                f" {_model(other.content)}; an average is of one model"
            )
    sets: dict[tuple[str, str], Path] = {}
    for one in evaluations:
        key = (one.content["format"], one.content["questions"])
        if key in sets:
            raise UserError(f"{sets[key]} and {one.path} are both of {key[1]}; give one of them")
        sets[key] = one.path
    formats = [one.content["format"] for one in evaluations]
    stems = [one.path.stem for one in evaluations]
    names = formats if len({*formats}) == len(formats) else stems
    if len({*names}) < len(names):
        names = [str(path) for path in paths]
    return [replace(one, name=name) for one, name in zip(evaluations, names, strict=True)]


def _is_same_model(content: dict[str, Any], other: dict[str, Any]) -> bool:
    """By the weights' key where both have one, which older results have not; else by name."""
    by = "model_key" if "model_key" in content and "model_key" in other else "model"
    return all(content.get(name) == other.get(name) for name in (by, "adapter_path"))


def _model(content: dict[str, Any]) -> str:
    adapters = content.get("adapter_path")
    return f"{content['model']}{f' with {adapters}' if adapters else ''}"


def merge(paths: Sequence[Path]) -> dict[str, Any]:
    """The figures of all files side by side: the content of --json.

    Only a method that every file has with the same budget has an average; the others are listed.
    Raises UserError where there is none but random, or for results that do not belong together.
    """
    evaluations = read_evaluations(paths)
    keys = dict.fromkeys(key for one in evaluations for key in one.rows)
    common = [key for key in keys if all(key in one.rows for one in evaluations)]
    if not any(spec != "random" for spec, _, _ in common):
        lists = [f"{one.path} has {_named(one.rows)}" for one in evaluations]
        raise UserError(f"no method is in every file with the same budget: {'; '.join(lists)}")
    return {
        "command": "evaluate --merge",
        "model": evaluations[0].content["model"],
        "sets": [
            {"name": one.name, "file": str(one.path), "full": one.full}
            | {name: one.content[name] for name in ("questions", "format", "count", "unit")}
            for one in evaluations
        ],
        "rows": [_full_row(evaluations), *(_row(key, evaluations) for key in common)],
        "left_out": [
            {
                "method": _name(key),
                "missing": [str(one.path) for one in evaluations if key not in one.rows],
            }
            for key in keys
            if key not in common
        ],
        "machine": describe_machine(),
        "versions": versions(),
    }


def _full_row(evaluations: Sequence[SetEvaluation]) -> dict[str, Any]:
    figures = {one.name: one.full for one in evaluations}
    relative = {name: 100.0 for name in figures}
    return {"pruner": FULL, "budget": None, "overall": figures, "relative": relative, "rel": 100.0}


def _row(key: MethodKey, evaluations: Sequence[SetEvaluation]) -> dict[str, Any]:
    spec, positions, K = key
    figures = {one.name: float(one.rows[key]["overall"]) for one in evaluations}
    relative = {one.name: 100 * figures[one.name] / one.full for one in evaluations}
    return {
        "pruner": spec,
        **({"positions": positions} if positions else {}),
        "budget": K,
        "overall": figures,
        "relative": {name: round(value, 2) for name, value in relative.items()},
        "rel": round(sum(relative.values()) / len(relative), 2),
    }


def _named(rows: dict[MethodKey, dict[str, Any]]) -> str:
    names = [_name(key) for key in rows if key[0] != "random"]
    return f"{', '.join(names[:3])}{' …' if len(names) > 3 else ''}" or "none but random"


def _name(key: MethodKey) -> str:
    spec, positions, K = key
    return " ".join(filter(None, (spec, positions, f"({budget_text(K)})")))


def budget_text(K: float | None) -> str:
    """A budget in a column: tokens, or a share."""
    return "all" if K is None else f"{K}" if isinstance(K, int) else f"{K:.4g}"


def merged_table(merged: dict[str, Any]) -> str:
    """The rows by budget, the best first; each set's figure, and Rel. at the end."""
    sets = merged["sets"]
    factors = {one["name"]: 100 if one["unit"] == "%" else 1 for one in sets}
    width = max(len(label(row)) for row in merged["rows"])
    widths = {name: max(8, len(name) + 2) for name in factors}
    titles = "".join(f"{name:>{widths[name]}}" for name in factors)
    lines = [f"{'pruner':<{width}}  budget{titles}    Rel."]
    budgets = sorted({row["budget"] for row in merged["rows"][1:]}, reverse=True)
    for budget in (None, *budgets):
        rows = [row for row in merged["rows"] if row["budget"] == budget]
        lines.append("")
        for row in sorted(rows, key=lambda row: -row["rel"]):
            figures = row["overall"].items()
            cells = "".join(f"{factors[n] * x:>{widths[n]}.1f}" for n, x in figures)
            head = f"{label(row):<{width}}  {budget_text(budget):>6}"
            lines.append(f"{head}{cells}{row['rel']:>8.1f}")
    counts = ", ".join(f"{one['name']} ({one['count']} questions)" for one in sets)
    lines += ["", f"{counts}.", "Rel.: in % of the figure with all tokens, the mean over the sets."]
    for each in merged["left_out"]:
        lines.append(f"Left out: {each['method']} is not in {', '.join(each['missing'])}")
    return "\n".join(lines)
