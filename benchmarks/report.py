"""Write the README's tables from benchmarks/results: `python -m benchmarks.report`."""

import re
from collections.abc import Sequence
from pathlib import Path

from mlx_vlm_prune.checkpoints.errors import Parser, in_one_sentence
from mlx_vlm_prune.checkpoints.files import write_atomically
from mlx_vlm_prune.checkpoints.generations import GENERATIONS
from mlx_vlm_prune.pruners import METHODS
from mlx_vlm_prune.scenes import KINDS

from .tables import budgets_table, claims_table, hosts_table, read, rivals_table, speed_table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def scenes(results: Path = RESULTS, name: str = "scenes") -> dict[str, dict[int, dict]]:
    """What each method answered, by name and budget, in the order of the table of methods."""
    told = read(results, name)
    found: dict[str, dict[int, dict]] = {}
    order = list(METHODS)
    rows = sorted(told["rows"], key=lambda r: (_chained(r), order.index(_first(r)), -r["tokens"]))
    for row in rows:
        found.setdefault(row["pruner"], {})[row["tokens"]] = row
    return found


def _first(row: dict) -> str:
    return re.split(r"[:+]", row["pruner"])[0]


def _chained(row: dict) -> bool:
    return "+" in row["pruner"]


def verdict(row: dict) -> str:
    """Above or below random at the same budget, where the interval says so."""
    _, low, high = row.get("to_random", {}).get("overall", (0, -1, 1))
    return " ▲" if low > 0 else " ▼" if high < 0 else ""


def scenes_table(results: Path = RESULTS) -> str:
    """Mean accuracy of the built-in model at each budget, in Markdown."""
    found = scenes(results)
    budgets = sorted({k for rows in found.values() for k in rows if k != 196}, reverse=True)
    heads = " | ".join(f"{k} tokens" for k in budgets)
    lines = [f"| pruner | {heads} |", "|---|" + "---:|" * len(budgets)]
    for name, rows in found.items():
        if name != "none":
            cells = [
                f"{rows[k]['overall']:.1%}{verdict(rows[k])}" if k in rows else "–" for k in budgets
            ]
            lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def kinds_table(results: Path = RESULTS) -> str:
    """What comes free: all tokens, and the majority answer, per kind of question."""
    told = read(results, "scenes")
    lines = ["| | " + " | ".join(KINDS) + " | mean |", "|---|" + "---:|" * (len(KINDS) + 1)]
    full = scenes(results)["none"][196]["accuracy"]
    lines += [_line("all 196 tokens", full), _line("majority answer", told["majority"])]
    return "\n".join(lines)


def _line(name: str, figures: dict[str, float]) -> str:
    shown = [f"{figures[kind]:.1%}" for kind in KINDS]
    total = sum(figures[kind] for kind in KINDS) / len(KINDS)
    return f"| {name} | " + " | ".join(shown) + f" | {total:.1%} |"


def methods_table(results: Path = RESULTS) -> str:
    """Every method in a line, from its own file, in Markdown."""
    lines = ["| `--pruner` | stage | what it does | source |", "|---|---|---|---|"]
    for name, method in METHODS.items():
        stage = method.stage.name.lower()
        lines.append(f"| `{name}` | {stage} | {method.idea} | {link(method.source)} |")
    return "\n".join(lines)


def link(source: str) -> str:
    """A source as a Markdown link."""
    if source.startswith("arXiv:"):
        return f"[{source}](https://arxiv.org/abs/{source.removeprefix('arXiv:')})"
    return f"[{source.split('/')[-1]}](https://{source})" if source else "–"


def selectors_table(results: Path = RESULTS) -> str:
    """What choosing costs, in Markdown: the methods in columns of three."""
    told = read(results, "selectors")
    rows = sorted(told["rows"], key=lambda r: -r["ms"]["median"])
    cells = [f"`{r['pruner']}` | {r['ms']['median']:.1f} ms | {r['share']:.2%}" for r in rows]
    third = -(-len(cells) // 3)
    cells += [" | | "] * (3 * third - len(cells))
    lines = ["| pruner | time | of TTFT " * 3 + "|", "|---|---:|---:" * 3 + "|"]
    for i in range(third):
        lines.append("| " + " | ".join(cells[i::third]) + " |")
    return "\n".join(lines)


LEARNED = ("attention_pool", "score_prune", "mlp")


def learned_table(results: Path = RESULTS) -> str:
    """Learned methods with the model frozen and trained along, in Markdown."""
    lines = ["| pruner | trained | all 196 | 98 | 49 | 22 |", "|---|---|---:|---:|---:|---:|"]
    for name in LEARNED:
        told = scenes(results)
        lines += [_learned_line(told, spec, "alone") for spec in told if _is(spec, name)]
        own = scenes(results, f"unfrozen-{name}")
        lines += [_learned_line(own, spec, "with the model") for spec in own if _is(spec, name)]
        lines.append(_learned_line(own, "random", f"– (the model of `{name}`)"))
    return "\n".join(lines)


def _is(spec: str, name: str) -> bool:
    return spec.split(":")[0] == name


def _learned_line(found: dict[str, dict[int, dict]], spec: str, how: str) -> str:
    rows = {**found["none"], **found[spec]}
    cells = [f"{rows[k]['overall']:.1%}" if k in rows else "–" for k in (196, 98, 49, 22)]
    return f"| `{spec}` | {how} | " + " | ".join(cells) + " |"


def quantized_table(results: Path = RESULTS) -> str:
    """Size and accuracy of the built-in model in fewer bits, in Markdown."""
    spec, K = "received_attention", 98
    lines = [f"| language model | size | all 196 tokens | `{spec}`, {K} |", "|---|---:|---:|---:|"]
    for title, name in (
        ("16 bits", "scenes"),
        ("8 bits", "quantized-8"),
        ("4 bits", "quantized-4"),
    ):
        found, size = scenes(results, name), read(results, name)["megabytes"]
        told = [found["none"][196]["overall"], found[spec][K]["overall"]]
        cells = [f"{size:.1f} MB", *(f"{share:.1%}" for share in told)]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def conversion_table(results: Path = RESULTS) -> str:
    """How fast a checkpoint is converted, in Markdown."""
    told = read(results, "conversion")
    lines = [
        "| from | file | time | of the speed of copying the file | peak memory |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in told["rows"]:
        seconds = sorted(row["conversion_s"])[len(row["conversion_s"]) // 2]
        lines.append(
            f"| {GENERATIONS[row['generation']].title} | {row['megabytes']} MB | {seconds:.1f} s | "
            f"{row['speed_of_copying']:.0%} | {row['peak_megabytes']} MB |"
        )
    return "\n".join(lines)


TABLES = {
    "methods": methods_table,
    "kinds": kinds_table,
    "scenes": scenes_table,
    "speed": speed_table,
    "claims": claims_table,
    "rivals": rivals_table,
    "hosts": hosts_table,
    "budgets": budgets_table,
    "selectors": selectors_table,
    "learned": learned_table,
    "quantized": quantized_table,
    "conversion": conversion_table,
}


def fill(text: str, results: Path = RESULTS) -> str:
    """The text with each `<!-- table NAME -->` block holding the current table."""
    for name, table in TABLES.items():
        block = f"<!-- table {name} -->\n{table(results)}\n<!-- end -->"
        place = rf"<!-- table {name} -->\n.*?<!-- end -->"
        text = re.sub(place, block.replace("\\", r"\\"), text, flags=re.S)
    return text


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; a user's mistake ends in one sentence and exit code 2."""
    p = Parser(prog="python -m benchmarks.report", description=(__doc__ or "").split("\n")[0])
    with in_one_sentence():
        p.parse_args(argv)
        readme = ROOT / "README.md"
        write_atomically(readme, fill(readme.read_text(encoding="utf-8")))
        print(f"Wrote {readme}")


if __name__ == "__main__":
    main()
