"""Write all tables of the pages, from benchmarks/results: `python -m benchmarks.report`."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_vlm_prune.checkpoints.command_line import Parser, in_one_sentence
from mlx_vlm_prune.checkpoints.minimind.generations import GENERATIONS
from mlx_vlm_prune.checkpoints.reading.files import write_atomically
from mlx_vlm_prune.pruners import METHODS
from mlx_vlm_prune.scenes import EVALUATION, KINDS

from .auto_tables import auto_caution_table, auto_order_table, shipped_evaluation
from .command_line import RESULTS
from .device_page import page
from .front_table import front_table
from .hosts_page import page as hosts_page
from .readme_tables import (
    budgets_table,
    claims_table,
    days,
    efficientvlm_table,
    hosts_table,
    markdown,
    read,
    rivals_table,
    speed_table,
    training_table,
)
from .serving_table import load_table, serving_table

ROOT = Path(__file__).parent.parent
# The pages with tables among words; `main` makes the other pages as a whole.
PAGES = (
    "README.md", "docs/auto.md", "docs/benchmarks.md", "docs/budgets.md", "docs/convert.md",
    "docs/methods.md", "docs/training.md",
)  # fmt: skip
FILLED = [ROOT / page for page in PAGES]


def scenes(results: Path = RESULTS, name: str = "scenes") -> dict[str, dict[int, dict]]:
    """Rows of an evaluation on scenes by method and budget, in the order of METHODS."""
    rows_by_method: dict[str, dict[int, dict]] = {}
    order = list(METHODS)
    rows = sorted(
        read(results, name)["rows"],
        key=lambda r: ("+" in r["pruner"], order.index(_first_method(r["pruner"])), -r["tokens"]),
    )
    for row in rows:
        rows_by_method.setdefault(row["pruner"], {})[row["tokens"]] = row
    return rows_by_method


def _first_method(spec: str) -> str:
    return re.split(r"[:+]", spec)[0]


def random_mark(row: dict) -> str:
    """▲ or ▼ if the interval of the difference to `random` at the same budget excludes 0."""
    _, low, high = row.get("to_random", {}).get("overall", (0, -1, 1))
    return " ▲" if low > 0 else " ▼" if high < 0 else ""


def _share(rows: dict[int, dict], tokens: int) -> str:
    """A method's mean accuracy at a budget, with its mark."""
    if tokens not in rows:
        return "–"
    return f"{rows[tokens]['overall']:.1%}{random_mark(rows[tokens])}"


def scenes_table(results: Path = RESULTS) -> str:
    """Mean accuracy of the built-in model at each budget, in Markdown."""
    accuracy = scenes(results)
    budgets = sorted({k for rows in accuracy.values() for k in rows if k != 196}, reverse=True)
    heads = ["pruner", *(head for k in budgets for head in (f"{k} tokens", f"`{ENHANCED}`"))]
    lines = []
    for name, rows in accuracy.items():
        if name == "none" or name.removesuffix(ENHANCED) in accuracy.keys() - {name}:
            continue
        sides = rows, accuracy.get(name + ENHANCED, {})
        cells = [_share(side, k) for k in budgets for side in sides]
        lines.append([f"`{name}`", *cells])
    table = markdown(heads, "l" + "r" * len(heads[1:]), lines)
    return f"{table}\n\n{_evaluated(read(results, 'scenes'))}"


def _evaluated(result: dict[str, Any]) -> str:
    """When the table was measured, and which methods are not in it."""
    known = {part.split(":")[0] for row in result["rows"] for part in row["pruner"].split("+")}
    missing: dict[str, list[str]] = {}
    for name, method in METHODS.items():
        if name not in known:
            reason = "for clips" if method.reads_frames else ""
            reason = reason or ("no weights for this model" if method.learned else "newer")
            missing.setdefault(reason, []).append(f"`{name}`")
    sentence = (
        f"Measured on {days(result)}, {result['count']:,} questions, by"
        " `python -m mlx_vlm_prune.evaluate --all`."
    )
    left_out = [f"{', '.join(names)} ({reason})" for reason, names in missing.items()]
    return f"{sentence} Not in it: {'; '.join(left_out)}." if missing else sentence


def deep_table(results: Path = RESULTS) -> str:
    """Mean accuracy with twelve layers in the language model beside four, in Markdown."""
    result, deep = read(results, "scenes-deep"), scenes(results, "scenes-deep")
    layers = (4, scenes(results)), (12, deep)
    budgets = sorted({k for rows in deep.values() for k in rows if k != 196}, reverse=True)
    heads = ["pruner", *(f"{k} tokens: {depth} layers" for k in budgets for depth, _ in layers)]
    lines = []
    for name in deep:
        cells = [_share(accuracy.get(name, {}), k) for k in budgets for _, accuracy in layers]
        if name != "none":
            lines.append([f"`{name}`", *cells])
    table = markdown(heads, "l" + "r" * len(heads[1:]), lines)
    full = [f"{accuracy['none'][196]['overall']:.1%} ({depth})" for depth, accuracy in layers]
    return (
        f"{table}\n\nWith all 196 tokens: {', '.join(full)}. Twelve layers: {result['count']:,}"
        f" questions on {days(result)}, by `python -m mlx_vlm_prune.evaluate --model scenes-deep"
        " --per-kind 100 --keep-tokens 98 49 22 --pruner NAME …`."
    )


def kinds_table(results: Path = RESULTS) -> str:
    """Accuracy per kind of question with all tokens, and of always the majority answer."""
    majority = read(results, "scenes")["majority"]
    full = scenes(results)["none"][196]["accuracy"]
    lines = [_kinds_line("all 196 tokens", full), _kinds_line("majority answer", majority)]
    return markdown(["", *KINDS, "mean"], "l" + "r" * (len(KINDS) + 1), lines)


def _kinds_line(name: str, figures: dict[str, float]) -> list[str]:
    shares = [figures[kind] for kind in KINDS]
    return [name, *(f"{share:.1%}" for share in (*shares, sum(shares) / len(KINDS)))]


def methods_table(results: Path = RESULTS) -> str:
    """A line for every method, from its file, in Markdown."""
    lines = [
        [f"`{name}`", method.stage.name.lower(), method.summary, link(method.source)]
        for name, method in METHODS.items()
    ]
    return markdown(("`--pruner`", "stage", "what it does", "source"), "llll", lines)


def link(source: str) -> str:
    """A source as a Markdown link."""
    if source.startswith("arXiv:"):
        return f"[{source}](https://arxiv.org/abs/{source.removeprefix('arXiv:')})"
    title = "CVPR" if source.startswith("cvpr.") else source.split("/")[-1]
    return f"[{title}](https://{source})" if source else "–"


def selectors_table(results: Path = RESULTS) -> str:
    """The time of each selection, in Markdown, three methods a line."""
    rows = sorted(read(results, "selectors")["rows"], key=lambda r: -r["ms"]["median"])
    cells = [f"`{r['pruner']}` | {r['ms']['median']:.1f} ms | {r['share']:.2%}" for r in rows]
    third = -(-len(cells) // 3)
    cells += [" | | "] * (3 * third - len(cells))
    lines = [cells[i::third] for i in range(third)]
    return markdown(("pruner", "time", "of TTFT") * 3, "lrr" * 3, lines)


ENHANCED = "+restore"  # of what a selector has beside it in the table of accuracy
LEARNED = ("attention_pool", "score_prune", "mlp")


def learned_table(results: Path = RESULTS) -> str:
    """Learned methods trained with the model frozen and together with it, in Markdown."""
    lines, frozen = [], scenes(results)
    for name in LEARNED:
        lines += [_learned_line(frozen, spec, "alone") for spec in frozen if _is_method(spec, name)]
        unfrozen = scenes(results, f"unfrozen-{name}")
        lines += [
            _learned_line(unfrozen, spec, "with the model")
            for spec in unfrozen
            if _is_method(spec, name)
        ]
        lines.append(_learned_line(unfrozen, "random", f"– (the model of `{name}`)"))
    return markdown(("pruner", "trained", "all 196", "98", "49", "22"), "llrrrr", lines)


def _is_method(spec: str, name: str) -> bool:
    return spec.split(":")[0] == name


def _learned_line(accuracy: dict[str, dict[int, dict]], spec: str, training: str) -> list[str]:
    rows = {**accuracy["none"], **accuracy[spec]}
    cells = [f"{rows[k]['overall']:.1%}" if k in rows else "–" for k in (196, 98, 49, 22)]
    return [f"`{spec}`", training, *cells]


def quantized_table(results: Path = RESULTS) -> str:
    """Size and accuracy of the built-in model in fewer bits, in Markdown."""
    spec, K = "received_attention", 98
    heads, lines = ("language model", "size", "all 196 tokens", f"`{spec}`, {K}"), []
    for bits, name in ((16, "scenes"), (8, "quantized-8"), (4, "quantized-4")):
        accuracy, size = scenes(results, name), read(results, name)["megabytes"]
        shares = [accuracy["none"][196]["overall"], accuracy[spec][K]["overall"]]
        lines.append([f"{bits} bits", f"{size:.1f} MB", *(f"{share:.1%}" for share in shares)])
    return markdown(heads, "lrrr", lines)


def conversion_table(results: Path = RESULTS) -> str:
    """Time and memory of conversions, in Markdown."""
    heads = ("from", "file", "time", "of the speed of copying the file", "peak memory")
    lines = []
    for row in read(results, "conversion")["rows"]:
        seconds = sorted(row["conversion_s"])[len(row["conversion_s"]) // 2]
        title, share = GENERATIONS[row["generation"]].title, f"{row['speed_of_copying']:.0%}"
        sizes = [f"{row[name]} MB" for name in ("megabytes", "peak_megabytes")]
        lines.append([title, sizes[0], f"{seconds:.1f} s", share, sizes[1]])
    return markdown(heads, "lrrrr", lines)


TABLES = {
    "auto order": auto_order_table,
    "auto caution": auto_caution_table,
    "front": front_table,
    "methods": methods_table,
    "kinds": kinds_table,
    "scenes": scenes_table,
    "scenes-deep": deep_table,
    "speed": speed_table,
    "claims": claims_table,
    "rivals": rivals_table,
    "hosts": hosts_table,
    "budgets": budgets_table,
    "selectors": selectors_table,
    "learned": learned_table,
    "quantized": quantized_table,
    "conversion": conversion_table,
    "training": training_table,
    "efficientvlm": efficientvlm_table,
    "serving": serving_table,
    "serving load": load_table,
}


def fill(text: str, results: Path = RESULTS) -> str:
    """The text with the current table in each `<!-- table NAME -->` block."""
    for name, table in TABLES.items():
        block = f"<!-- table {name} -->\n{table(results)}\n<!-- end -->"
        pattern = rf"<!-- table {name} -->\n.*?<!-- end -->"
        text = re.sub(pattern, block.replace("\\", r"\\"), text, flags=re.S)
    return text


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; a UserError ends in one sentence and exit code 2."""
    p = Parser("benchmarks.report", description=(__doc__ or "").split("\n")[0])
    with in_one_sentence():
        p.parse_args(argv)
        devices, hosts = ROOT / "docs" / "devices.md", ROOT / "docs" / "hosts.md"
        for file in FILLED:
            write_atomically(file, fill(file.read_text(encoding="utf-8")))
        write_atomically(devices, page(RESULTS))
        write_atomically(hosts, hosts_page())
        write_atomically(EVALUATION, shipped_evaluation(RESULTS))
        print(f"Wrote {', '.join(map(str, [*FILLED, devices]))} and {hosts}")


if __name__ == "__main__":
    main()
