"""Write the README's tables from benchmarks/results: `python -m benchmarks.report`."""

import json
import re
from pathlib import Path

from mlx_vlm_prune.scenes import KINDS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def scenes_table(results: Path = RESULTS) -> str:
    """Accuracy of the built-in model per kind of question, in Markdown."""
    told = json.loads((results / "scenes.json").read_text(encoding="utf-8"))
    lines = [
        "| pruner | visual tokens | " + " | ".join(KINDS) + " | mean |",
        "|---|---:|" + "---:|" * (len(KINDS) + 1),
        _line("majority answer", "–", told["majority"]),
    ]
    lines += [_line(f"`{r['pruner']}`", str(r["tokens"]), r["accuracy"]) for r in told["rows"]]
    return "\n".join(lines)


def _line(name: str, tokens: str, figures: dict[str, float]) -> str:
    shown = [f"{figures[kind]:.1%}" for kind in KINDS]
    mean = sum(figures[kind] for kind in KINDS) / len(KINDS)
    return f"| {name} | {tokens} | " + " | ".join(shown) + f" | {mean:.1%} |"


def speed_table(results: Path = RESULTS) -> str:
    """Realised and predicted speed per method, in Markdown."""
    told = json.loads((results / "speed.json").read_text(encoding="utf-8"))
    lines = [
        "| pruner | visual tokens | prefill, ms | gain (predicted) "
        "| first token, ms | gain | pruner |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in told["rows"]:
        full, kept = r["ms"]["full"], r["ms"]["pruned"]
        cells = [
            f"`{r['pruner']}`",
            f"{r['tokens']} → {r['kept']}",
            f"{full['prefill']['median']:.0f} → {kept['prefill']['median']:.0f}",
            f"{r['prefill_gain']:.2f}x ({r['prefill_gain_predicted']:.2f}x)",
            f"{full['total']['median']:.0f} → {kept['total']['median']:.0f}",
            f"{r['ttft_gain']:.2f}x",
            f"{r['pruner_share']:.1%}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


TABLES = {"scenes": scenes_table, "speed": speed_table}


def fill(text: str, results: Path = RESULTS) -> str:
    """The text with each `<!-- table NAME -->` block holding the current table."""
    for name, table in TABLES.items():
        block = f"<!-- table {name} -->\n{table(results)}\n<!-- end -->"
        place = rf"<!-- table {name} -->\n.*?<!-- end -->"
        text = re.sub(place, block.replace("\\", r"\\"), text, flags=re.S)
    return text


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(fill(readme.read_text(encoding="utf-8")), encoding="utf-8")
