"""The pages' tables of speed, each with what the operation count predicts."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_vlm_prune.checkpoints.reading.files import read_json
from mlx_vlm_prune.inputs.budget import tokens_for
from mlx_vlm_prune.machine.timing import times_text

from .claims import CLAIMS, claimed_gain
from .speculation import summary
from .training_speed import HEADS, cells

NOT_MEASURED = "Not measured yet."
SHARES = ((0.5, "50 %"), (0.25, "25 %"), (0.11, "11 %"))


def table_of(results: Path, name: str, rows: Callable[[dict[str, Any]], str]) -> str:
    """What `rows` makes of a result, where it was measured."""
    if not (results / f"{name}.json").exists():
        return NOT_MEASURED
    return rows(read(results, name))


def days(evaluation: Mapping[str, Any]) -> str:
    """The days on which an evaluation was measured, with those of rows taken from earlier ones."""
    dates = [evaluation["date"], *(source["date"] for source in evaluation.get("earlier", ()))]
    return " and ".join(sorted({date[:10] for date in dates}))


def read(results: Path, name: str) -> dict[str, Any]:
    return read_json(results / f"{name}.json")


def markdown(heads: Sequence[str], align: str, rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; `align` is a string of "l" or "r", one for each column."""
    lines = ["|" + "".join(f" {head} |" if head else " |" for head in heads)]
    lines.append("|" + "".join({"l": "---|", "r": "---:|"}[side] for side in align))
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def speed_rows(results: Path) -> list[dict[str, Any]]:
    """The rows of all shapes, from the results of several runs."""
    files = ("speed", "speed-llava", "speed-scenes")
    return [row for name in files for row in read(results, name)["rows"]]


def speed_table(results: Path) -> str:
    """Gains of every shape and method in first token and prefill, at three budgets."""
    lines, heads = [], ["shape", "pruner"]
    for _, share in SHARES:
        heads += [f"{share} kept: first token", "prefill"]
    cells: dict[tuple[str, str], dict[int, dict]] = {}
    for row in speed_rows(results):
        if row["shape"] == "scenes":
            continue  # it is in the figure of accuracy against time
        cells.setdefault((row["shape"], row["pruner"]), {})[row["budget"]] = row
    for (shape, pruner), rows in cells.items():
        N = next(iter(rows.values()))["tokens"]
        measured = [rows.get(tokens_for(N, share)) for share, _ in SHARES]
        gains = [f"{_gain(row, 'total')} | {_gain_and_share(row, 'prefill')}" for row in measured]
        lines.append([shape, f"`{pruner}`", *gains])
    return markdown(heads, "ll" + "rr" * len(SHARES), lines)


def _gain(row: dict | None, part: str) -> str:
    return "–" if row is None else times_text(row["gain"][part]["realised"])


def _gain_and_share(row: dict | None, part: str) -> str:
    """The gain, and its share of the gain that the operation count predicts."""
    share = row and row["gain"][part]["of_predicted"]
    return _gain(row, part) + (f" ({share:.0%})" if share else "")


def claims_table(results: Path) -> str:
    """The founding systems' claims and what is measured, in Markdown."""
    measured = {row["system"]: row for row in read(results, "claims")["rows"]}
    judged = {(row["pruner"], row["tokens"]): row for row in read(results, "scenes")["rows"]}
    full = judged["none", 196]["overall"]
    heads = (
        "system", "it claims", "measured: what it timed", "first token, everything inside",
        "answers right on scenes",
    )  # fmt: skip
    lines = []
    for claim in CLAIMS:
        row = measured[claim.system]
        gain = claimed_gain(claim, row) if claim.timed else _drafting_gain(results)
        pruner, tokens = claim.judged
        scored = judged.get(claim.judged)
        right = "–"
        if scored:
            right = f"{full:.1%} → {scored['overall']:.1%} (`{pruner}`, {tokens} of 196)"
        lines.append([claim.system, claim.headline, gain, _gain(row, "total"), right])
    return markdown(heads, "llrrr", lines)


def _drafting_gain(results: Path) -> str:
    """The gain of speculative decoding, if it was measured."""
    is_measured = (results / "speculation.json").exists()
    return summary(read(results, "speculation")) if is_measured else "not measured yet"


def rivals_table(results: Path) -> str:
    """Our unpruned times beside transformers' and mlx-lm's, in Markdown."""
    heads = ("shape", "beside", "part", "ours, ms", "theirs, ms", "times as fast, p10 to p90")
    lines = []
    for row in read(results, "rivals")["rows"]:
        ms = [f"{row[side]['median']:.1f}" for side in ("ours_ms", "theirs_ms")]
        spread = f"{row['gain']['p10']:.2f} to {row['gain']['p90']:.2f}"
        lines.append([row["shape"], row["rival"], row["part"], *ms, spread])
    return markdown(heads, "lllrrr", lines)


def budgets_table(results: Path) -> str:
    """Budgets in milliseconds that were met, with the chosen K and with more tokens."""
    heads = (
        "model", "pruner", "within the budget", "error of the prediction (median)",
        "with 1/49 of the tokens more", "with a quarter more",
    )  # fmt: skip
    lines = []
    for path in sorted(results.glob("budgets*.json")):
        result = read(results, path.stem)
        for row in result["rows"]:
            more = (row["within_with_more"].get(share) for share in ("1/49", "1/4"))
            tried = [f"{counts[0]} of {counts[1]}" if counts else "–" for counts in more]
            met = f"{row['met']} of {row['of']}"
            pruner = f"`{row['pruner']}`"
            lines.append([result["shape"], pruner, met, f"{row['off']:.1%}", *tried])
    return markdown(heads, "llrrrr", lines)


def hosts_table(results: Path) -> str:
    """mlx-vlm beside our path with all tokens and with a quarter, in Markdown."""
    heads = (
        "model", "first token, ms: mlx-vlm", "our path, all tokens", "mlx-vlm ÷ ours, p10 to p90",
        "a quarter kept", "prefill, times as fast (of predicted)",
    )  # fmt: skip
    lines = []
    for row in read(results, "hosts")["rows"]:
        ms = {kind: f"{parts['total']['median']:.1f}" for kind, parts in row["ms"].items()}
        ratio, gain = row["stock_by_ours"], {"gain": {"prefill": row["prefill"]}}
        stock_by_ours = f"{ratio['median']:.2f} ({ratio['p10']:.2f} to {ratio['p90']:.2f})"
        model = f"{row['family']}, {row['size']}, {row['tokens']} tokens"
        predicted = _gain_and_share(gain, "prefill")
        lines.append([model, ms["stock"], ms["full"], stock_by_ours, ms["pruned"], predicted])
    return markdown(heads, "lrrrrr", lines)


def efficientvlm_table(results: Path) -> str:
    """What `benchmarks.efficientvlm` measured, in Markdown."""
    return table_of(results, "efficientvlm", efficientvlm_rows)


def efficientvlm_rows(result: dict[str, Any]) -> str:
    """Each case's accuracy, times and operation count."""
    heads = (
        "trained behind", "tokens", "answers right", "first token, ms", "tokens/s",
        "multiply-adds to the first token, M",
    )  # fmt: skip
    rows = {row["budget"]: row for row in result["timings"]["rows"]}
    lines = []
    for case in result["cases"]:
        kind = "pruned" if case["tokens"] in rows else "full"
        row = rows.get(case["tokens"], next(iter(rows.values())))
        ms, operations = row["ms"][kind], row["operations"][kind]
        count = sum(operations[part] for part in ("vision", "projector", "prefill"))
        lines.append([
            f"`{case['pruner']}`", f"{case['tokens']}", f"{case['overall']:.1%}",
            f"{ms['total']['median']:.1f}", f"{1000 / ms['token']['median']:.0f}",
            f"{count / 1e6:.0f}",
        ])  # fmt: skip
    return markdown(heads, "lrrrrr", lines)


def training_table(results: Path) -> str:
    """Training steps of ours beside others', in Markdown."""
    return table_of(
        results,
        "training_speed",
        lambda result: markdown(HEADS, "lllrrrrl", [cells(row) for row in result["rows"]]),
    )
