"""The server's tables in docs/benchmarks.md: what serving costs and gains, and load."""

from pathlib import Path
from typing import Any

from mlx_vlm_prune.machine.timing import times_text

from .readme_tables import markdown, table_of
from .serving_speed import FULL, GENERATE, SERVE

ENDS = {"same as alone": "answered as alone", "refused": "bad, refused", "left": "left"}


def serving_table(results: Path) -> str:
    """One request beside `generate`, and several at once with all tokens and with a part of them,
    in Markdown."""
    return table_of(results, "serving_speed", serving_rows)


def serving_rows(result: dict[str, Any]) -> str:
    """A row for each method of each model."""
    share, clients = f"{result['keep_ratio']:.0%}", result["clients"]
    heads = (
        "model", "one request, ms: `generate`", "served", "served ÷ `generate`, p10 to p90",
        f"{clients} at once, requests/s: all tokens", "method", f"{share} of the tokens",
        "times as many, p10 to p90",
    )  # fmt: skip
    lines = []
    for row in result["rows"]:
        cost, rates = row["serve_by_generate"], row["requests_per_s"]
        one = [f"{row['one_ms'][side]['median']:.0f}" for side in (GENERATE, SERVE)]
        spread = f"{cost['median']:.3f} ({cost['p10']:.3f} to {cost['p90']:.3f})"
        model = f"{row['family']}, {row['size']}, {row['tokens']} tokens"
        for pruner, gain in row["gains"].items():
            times = times_text(gain["realised"], "not told")
            lines.append([
                model, *one, spread, f"{rates[FULL]['median']:.2f}", f"`{pruner}`",
                f"{rates[pruner]['median']:.2f}",
                f"{times} ({gain['p10']:.2f} to {gain['p90']:.2f})",
            ])  # fmt: skip
    return markdown(heads, "lrrrrlrr", lines)


def load_table(results: Path) -> str:
    """How requests ended under load, and the server's memory, in Markdown."""
    return table_of(results, "serving_load", load_rows)


def load_rows(result: dict[str, Any]) -> str:
    """One row: the requests by how they ended, and megabytes."""
    memory, ends = result["memory_mb"], result["ends"]
    heads = (
        "requests", "at once", "seconds", *ENDS.values(), "lost or wrong",
        "memory, MB: before", "half-way", "at most", "at the end",
    )  # fmt: skip
    wrong = sum(count for end, count in ends.items() if end not in ENDS)
    counts = [result["requests"], result["clients"], round(result["seconds"])]
    counts += [*(ends.get(end, 0) for end in ENDS), wrong]
    counts += [round(memory[when]) for when in ("before", "half_way", "at_most", "end")]
    return markdown(heads, "r" * len(heads), [[str(count) for count in counts]])
