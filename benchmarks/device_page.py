"""The page on every machine that was measured, docs/devices.md, from benchmarks/results."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mlx_vlm_prune.checkpoints.reading.files import read_json

from .gpu_tests import sentence
from .readme_tables import markdown

HEAD = """# Devices

What pruning gains on the machines that were measured. Each machine was measured by one command,
`make report` or `python -m benchmarks.device`, which writes `benchmarks/results/device-NAME.json`.
This page is made from these files (`python -m benchmarks.report`); nothing is written by hand.

Weights are random, in the published shapes. Full and pruned requests alternate in one process.
Times are medians. "Times as fast" is the median ratio of neighbouring runs, with the first and the
last decile; the median is omitted if there is no clear difference. The time to the first token
starts after the picture is opened. "Choosing" is empty if a method chooses inside the tower; then
the tower's time includes it.
"""
NONE_YET = "No machine has been measured yet.\n"


def page(results: Path) -> str:
    """The text of docs/devices.md: a section for every result."""
    files = sorted(results.glob("device-*.json"))
    sections = [section(read_json(file)) for file in files]
    return "\n".join([HEAD, *(sections or [NONE_YET])])


def section(result: dict[str, Any]) -> str:
    """A machine: what it is, its ceilings, our language model beside mlx-lm's, every case."""
    parts = [f"## {result['name']}", facts(result), *tests(result), *languages(result)]
    pairs = dict.fromkeys((row["tokens"], row["shape"]) for row in result["rows"])
    for tokens, shape in pairs:
        where = {"shape": shape, "tokens": tokens}
        parts += cases([row for row in result["rows"] if where.items() <= row.items()], where)
        parts += pictures([each for each in result["pictures"] if where.items() <= each.items()])
    parts += refusals(result["refused"])
    if result["missing"]:
        parts.append(f"Not measured, since time was over: {len(result['missing'])} cases.")
    return "\n\n".join(parts) + "\n"


def facts(result: dict[str, Any]) -> str:
    machine, versions = result["machine"], result["versions"]
    memory = result["memory_bytes"]
    words = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}",
        f"MLX {versions['mlx']} on {result['device']}",
        *([f"{memory / 1e9:.0f} GB for a model"] if memory else []),
        *([f"BLAS {versions['blas']}"] if versions["blas"] else []),
        *([f"OMP_NUM_THREADS={result['threads']}"] if result["threads"] else []),
        result["dtype"],
        f"{result['runs']} runs of each",
    ]
    rates = [f"{rate:g} Tflop/s ({name})" for name, rate in result["ceilings"]["tflops"].items()]
    commit = result["commit"] or "unknown"
    load = result["load"]
    busy = "" if load is None else f" Load of the machine at the start: {load:.1f}."
    return (
        f"Measured on {result['date']}, commit {commit}. {'; '.join(words)}.{busy}\n\n"
        f"Ceilings: matrix products {', '.join(rates)}; memory"
        f" {result['ceilings']['gb_per_s']:g} GB/s."
    )


def tests(result: dict[str, Any]) -> Iterator[str]:
    """What the tests on the GPU came to, where they were run, and which failed."""
    if outcome := result.get("tests"):
        failed = "".join(f"\n- failed: `{name}`" for name in outcome["failed"])
        yield sentence(outcome) + ("\n" + failed if failed else "")


def languages(result: dict[str, Any]) -> Iterator[str]:
    """The table of our language model beside mlx-lm's, and why rows are missing."""
    heads = ("shape", "rows", "part", "ours, ms", "mlx-lm, ms", "times as fast as mlx-lm")
    measured = [row for row in result["languages"] if "why" not in row]
    if measured:
        yield "Our language model beside mlx-lm's, same weights, nothing pruned:"
        yield markdown(heads, "lrlrrr", [_language_line(row) for row in measured])
    for why in dict.fromkeys(row["why"] for row in result["languages"] if "why" in row):
        yield f"Not compared with mlx-lm: {why}."


def _language_line(row: dict[str, Any]) -> list[str]:
    ms = [f"{row[side]['median']:.2f}" for side in ("ours_ms", "theirs_ms")]
    return [row["shape"], str(row["prompt_rows"]), row["part"], *ms, _deciles(row["gain"])]


def cases(rows: Sequence[dict[str, Any]], where: dict[str, Any]) -> Iterator[str]:
    """The table of a shape at a number of tokens, its largest budget first."""
    heads = ("kept", "pruner", "tower, ms", "choosing, ms", "prefill, ms", "first token, ms",
             "full, ms", "times as fast")  # fmt: skip
    rows = sorted(rows, key=lambda row: -row["budget"])  # stable: methods in their order
    full = [f"{ms:.1f}" for ms in _parts(rows[0]["ms"]["full"])]
    yield (
        f"### {where['shape']}, {where['tokens']} visual tokens\n\nFull: tower {full[0]}, projector"
        f" and prefill {full[2]}, first token {full[3]} ms."
    )
    yield markdown(heads, "rl" + "r" * 6, [_case_line(row) for row in rows])


def _case_line(row: dict[str, Any]) -> list[str]:
    tower, choosing, prefill, total = (f"{ms:.1f}" for ms in _parts(row["ms"]["pruned"]))
    full, chooses = row["ms"]["full"]["total"]["median"], row["ms"]["pruned"]["pruner"]["median"]
    shown = choosing if chooses else ""
    return [str(row["budget"]), f"`{row['pruner']}`", tower, shown, prefill, total, f"{full:.1f}",
            _deciles(row["gain"]["total"])]  # fmt: skip


def _parts(ms: dict[str, Any]) -> list[float]:
    """Medians of tower, choosing, projector with prefill, and all."""
    median = {part: spread["median"] for part, spread in ms.items()}
    prefill = median["projector"] + median["prefill"]
    return [median["vision"], median["pruner"], prefill, median["total"]]


def _deciles(gain: dict[str, Any]) -> str:
    """The gain if it is clear, and the first and last decile."""
    clear = "" if gain["realised"] is None else f"{gain['realised']:.2f}x "
    return f"{clear}({gain['p10']:.2f} to {gain['p90']:.2f})"


def pictures(measured: Sequence[dict[str, Any]]) -> Iterator[str]:
    for picture in measured:
        yield f"Opening a JPEG of 1024 x 768 for it took {picture['ms']['median']:.1f} ms."


def refusals(refused: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What cannot be, by its reason."""
    cases_by_reason: dict[str, list[str]] = {}
    for entry in refused:
        case = f"`{entry['pruner']}` {entry['budget']} of {entry['tokens']} ({entry['shape']})"
        cases_by_reason.setdefault(entry["why"], []).append(case)
    if cases_by_reason:
        lines = [f"- {', '.join(each)}: {why}" for why, each in cases_by_reason.items()]
        yield "Impossible:\n\n" + "\n".join(lines)
