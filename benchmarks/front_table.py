"""The README's one table: what pruning gains and costs, and how both were measured."""

import re
import statistics
from pathlib import Path
from typing import Any

from mlx_vlm_prune.checkpoints.reading.files import read_json
from mlx_vlm_prune.machine.timing import times_text
from mlx_vlm_prune.pruners.auto.choice import ModelFacts, by_evidence
from mlx_vlm_prune.pruners.auto.evidence import Evidence

from .model_shapes import SHAPES
from .readme_tables import days, markdown, read

BUDGETS = (49, 22)  # of 196 visual tokens
BEST = 3
CLOSE = 0.05  # a method is close to all tokens where it loses no more than this at every budget
NAMES = {
    "random": "`random`",
    "downsample": "`downsample`: a smaller picture",
}
GPU_RESULT = "device-h200"  # of benchmarks/results: the one of docs/devices.md that is shown
Rows = dict[str, dict[int, dict[str, Any]]]  # by pruner and budget


def front_table(results: Path) -> str:
    """All tokens, what `auto` takes, the best methods, `random`, a smaller picture: Markdown."""
    accuracy, speed = read(results, "scenes"), read(results, "speed-scenes")
    right, timed = _by_pruner(accuracy["rows"], "tokens"), _by_pruner(speed["rows"], "budget")
    of = right["none"][196]["of"]
    heads = ["", *(head for K in BUDGETS for head in (f"{K} of {of} tokens: right", "first token"))]
    full_ms = statistics.median(row["ms"]["full"]["total"]["median"] for row in speed["rows"])
    lines = [["all tokens", *[f"{right['none'][196]['overall']:.1%}", f"{full_ms:.0f} ms"] * 2]]
    chosen = _auto_choices(accuracy, of)
    for name in _front_methods(right, timed, [*chosen.values()]):
        cells = [cell for K in BUDGETS for cell in _cells(right[name], timed[name], K)]
        lines.append([NAMES.get(name, f"`{name}`"), *cells])
    table = markdown(heads, "l" + "rr" * len(BUDGETS), lines)
    sentences = [_auto_sentence(chosen), _measurement(accuracy, speed), *_gpu_sentences(results)]
    return "\n\n".join([table, *sentences])


def _by_pruner(rows: list[dict[str, Any]], budget: str) -> Rows:
    by_pruner: Rows = {}
    for row in rows:
        by_pruner.setdefault(row["pruner"], {})[row[budget]] = row
    return by_pruner


def _auto_choices(accuracy: dict[str, Any], of: int) -> dict[int, str]:
    """What `auto` takes of the built-in model at each budget."""
    facts = ModelFacts("", None, True, 0, of, lambda name, share: True)
    evidence = Evidence.of(accuracy)
    return {K: by_evidence(facts, evidence, K / of, {})[0] for K in BUDGETS}


def _auto_sentence(chosen: dict[int, str]) -> str:
    if len({*chosen.values()}) == 1:
        return f"`auto`, the default with a budget alone, chooses `{chosen[BUDGETS[0]]}` here."
    each = " and ".join(f"`{name}` at {K} tokens" for K, name in chosen.items())
    return f"`auto`, the default with a budget alone, chooses {each} here."


def _front_methods(right: Rows, timed: Rows, chosen: list[str]) -> list[str]:
    """The rows' methods: those with an accuracy and a time at every budget."""
    complete = [
        name
        for name in right
        if all(K in right[name] and K in timed.get(name, {}) for K in BUDGETS)
    ]
    candidates = [name for name in complete if name not in NAMES]
    best = sorted(candidates, key=lambda name: -_mean(right[name]))[:BEST]
    least = right["none"][196]["overall"] - CLOSE
    close = [n for n in candidates if all(right[n][K]["overall"] >= least for K in BUDGETS)]
    quickest = min(close, key=lambda name: _first_token(timed[name][BUDGETS[0]]), default=None)
    ordered = [*chosen, *best, *([quickest] if quickest else []), "random", "downsample"]
    return [name for name in dict.fromkeys(ordered) if name in complete]


def _mean(rows: dict[int, dict[str, Any]]) -> float:
    return statistics.mean(rows[K]["overall"] for K in BUDGETS)


def _first_token(row: dict[str, Any]) -> float:
    return row["ms"]["pruned"]["total"]["median"]


def _cells(right: dict[int, dict], timed: dict[int, dict], K: int) -> list[str]:
    gain = times_text(timed[K]["gain"]["total"]["realised"])
    return [f"{right[K]['overall']:.1%}", f"{_first_token(timed[K]):.0f} ms ({gain})"]


def _measurement(accuracy: dict[str, Any], speed: dict[str, Any]) -> str:
    """Date, machine and command of both halves of the table."""
    machine, mlx = speed["machine"], speed["versions"]["mlx"]
    cpu = re.sub(r"\((?:R|TM)\)", "", machine["cpu"])
    timed_on = f" on {speed['date']}" if "date" in speed else ""
    return (
        f"Right: the share of {accuracy['count']:,} questions, by `mlx-vlm-prune evaluate --all`,"
        f" {days(accuracy)}. First token: the median of {speed['runs']} runs{timed_on}, with"
        " the opening of the picture and the vision tower. The speedup is the median ratio to the"
        " run with all tokens just before. Measured by `python -m benchmarks.speed --shape scenes`"
        f" on {machine['cores']} cores"
        f" ({cpu}, {machine['system']}), MLX {mlx} on its {speed['device'].upper()}."
    )


def _gpu_sentences(results: Path) -> list[str]:
    """The clear gains on one GPU at a quarter of the tokens, in its largest measured shape."""
    file = results / f"{GPU_RESULT}.json"
    result = read_json(file) if file.is_file() else {"rows": []}
    rows = [row for row in result["rows"] if row["budget"] * 4 == row["tokens"]]
    largest = max(map(_size, rows), default=None)
    rows = [row for row in rows if _size(row) == largest]
    return [_gpu_sentence(result, rows)] if rows else []


def _size(row: dict[str, Any]) -> tuple[int, int]:
    """How large a row's language model is, and how many visual tokens it reads."""
    text = SHAPES[row["shape"]].text
    return text.num_hidden_layers * text.hidden_size**2, row["tokens"]


def _gpu_sentence(result: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    gains = {row["pruner"]: row["gain"]["total"]["realised"] for row in rows}
    clear = sorted((name for name in gains if gains[name]), key=lambda name: -gains[name])
    times = ", ".join(f"`{name}` {times_text(gains[name])}" for name in clear)
    unclear = ", ".join(f"`{name}`" for name in gains if not gains[name])
    gpu = re.sub(r"gpu \((.*)\)", r"\1", result["device"])
    commit = f", commit {result['commit']}" if result["commit"] else ""
    return (
        f"On a GPU ({gpu}, {result['date']}{commit}, `python -m benchmarks.device`), with random"
        f" weights in the shape of {rows[0]['shape']}, {rows[0]['budget']} of {rows[0]['tokens']}"
        f" tokens, the median of {result['runs']} runs. Speedup of the first token: "
        + (f"{times}." if clear else f"no clear difference with {unclear}.")
        + (f" No clear difference: {unclear}." if unclear and clear else "")
    )
