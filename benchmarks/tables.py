"""The README's tables of speed: what is measured beside what the operation count allows."""

from pathlib import Path
from typing import Any

from mlx_vlm_prune.checkpoints.files import read_json
from mlx_vlm_prune.pruners.budget import tokens_for

from .claims import CLAIMS, timed
from .speculation import summary

SHARES = ((0.5, "50 %"), (0.25, "25 %"), (0.11, "11 %"))


def read(results: Path, name: str) -> dict[str, Any]:
    return read_json(results / f"{name}.json")


def speed_rows(results: Path) -> list[dict[str, Any]]:
    """Of all shapes, which were measured in several runs."""
    files = ("speed", "speed-llava", "speed-scenes")
    return [row for name in files for row in read(results, name)["rows"]]


def speed_table(results: Path) -> str:
    """Of every shape and method, first token and prefill at three budgets, in Markdown."""
    heads = "".join(f" {share} kept: first token | prefill |" for _, share in SHARES)
    lines = [f"| shape | pruner |{heads}", "|---|---|" + "---:|---:|" * len(SHARES)]
    cells: dict[tuple[str, str], dict[int, dict]] = {}
    for row in speed_rows(results):
        if row["shape"] == "scenes":
            continue  # its figures are those of accuracy against time
        cells.setdefault((row["shape"], row["pruner"]), {})[row["budget"]] = row
    for (shape, pruner), rows in cells.items():
        N = next(iter(rows.values()))["tokens"]
        told = [rows.get(tokens_for(N, share)) for share, _ in SHARES]
        shown = [f"{_gain(row, 'total')} | {_gain(row, 'prefill', True)}" for row in told]
        lines.append(f"| {shape} | `{pruner}` | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _gain(row: dict | None, part: str, of_predicted: bool = False) -> str:
    return "–" if row is None else _told(row["gain"][part], of_predicted)


def _told(gain: dict, of_predicted: bool = False) -> str:
    """The gain; with `of_predicted`, how much of the operation count's own it is."""
    if gain["realised"] is None:
        return "?"  # spread larger than the difference
    share = f" ({gain['of_predicted']:.0%})" if of_predicted else ""
    return f"{gain['realised']:.2f}x{share}"


def claims_table(results: Path) -> str:
    """The founding systems, in Markdown."""
    told = {row["system"]: row for row in read(results, "claims")["rows"]}
    judged = {(row["pruner"], row["tokens"]): row for row in read(results, "scenes")["rows"]}
    full = judged["none", 196]["overall"]
    lines = [
        "| system | it claims | measured: what it timed | first token, everything inside "
        "| answers right on scenes |",
        "|---|---|---:|---:|---:|",
    ]
    for claim in CLAIMS:
        row = told[claim.system]
        gain = timed(claim, row) if claim.timed else _drafting(results)
        pruner, tokens = claim.judged
        own = judged.get(claim.judged)
        right = f"{full:.1%} → {own['overall']:.1%} (`{pruner}`, {tokens} of 196)" if own else "–"
        lines.append(
            f"| {claim.system} | {claim.says} | {gain} | {_gain(row, 'total')} | {right} |"
        )
    return "\n".join(lines)


def _drafting(results: Path) -> str:
    """What speculative decoding gains, where it was measured."""
    is_there = (results / "speculation.json").exists()
    return summary(read(results, "speculation")) if is_there else "not measured yet"


def rivals_table(results: Path) -> str:
    """Ours beside what one would take instead, full on both sides, in Markdown."""
    lines = [
        "| shape | beside | part | ours, ms | theirs, ms | times as fast, p10 to p90 |",
        "|---|---|---|---:|---:|---:|",
    ]
    for row in read(results, "rivals")["rows"]:
        gain = row["gain"]
        told = f"{gain['p10']:.2f} to {gain['p90']:.2f}"
        lines.append(
            f"| {row['shape']} | {row['rival']} | {row['part']} | {row['ours_ms']['median']:.1f} | "
            f"{row['theirs_ms']['median']:.1f} | {told} |"
        )
    return "\n".join(lines)


def budgets_table(results: Path) -> str:
    """Whether a wish in milliseconds was met, and what a few tokens more would have done."""
    told = read(results, "budgets")
    lines = [
        "| pruner | within the wish | prediction off by (median) | with 1/49 of the tokens more "
        "| with a quarter more |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in told["rows"]:
        more = {int(step): tried for step, tried in row["within_with_more"].items()}
        next_step, quarter = (more[step] for step in (min(more), max(more)))
        lines.append(
            f"| `{row['pruner']}` | {row['met']} of {row['of']} | {row['off']:.1%} | "
            f"{next_step[0]} of {next_step[1]} | {quarter[0]} of {quarter[1]} |"
        )
    return "\n".join(lines)


def hosts_table(results: Path) -> str:
    """mlx-vlm beside our path with all tokens, and beside a quarter of them, in Markdown."""
    told = read(results, "hosts")
    lines = [
        "| model | first token, ms: mlx-vlm | our path, all tokens | mlx-vlm ÷ ours, p10 to p90 | "
        "a quarter kept | prefill, times as fast (of predicted) |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in told["rows"]:
        ms = {who: parts["total"]["median"] for who, parts in row["ms"].items()}
        cost, gain = row["stock_by_ours"], row["prefill"]
        lines.append(
            f"| {row['family']}, {row['size']}, {row['tokens']} tokens | {ms['stock']:.1f} | "
            f"{ms['full']:.1f} | {cost['median']:.2f} ({cost['p10']:.2f} to {cost['p90']:.2f}) | "
            f"{ms['pruned']:.1f} | {_told(gain, True)} |"
        )
    return "\n".join(lines)
