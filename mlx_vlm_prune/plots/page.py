"""The page of all figures: one HTML file, with the pictures inside, that needs no server."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..evaluation.table import label
from .figures import PlannedFigure
from .measured import Evaluation, Measured, Sweep

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>mlx_vlm_prune: what was measured</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1500px; padding: 0 1em;
  color: #111; background: #fff }}
h1 {{ font-size: 1.4em }} h2 {{ font-size: 1.1em; margin-top: 2em }}
.figures {{ display: grid; gap: 1.5em;
  grid-template-columns: repeat(auto-fit, minmax(560px, 1fr)) }}
figure {{ margin: 0 }} img {{ max-width: 100% }}
table {{ border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto }}
th, td {{ padding: .25em .7em; text-align: right; border-bottom: 1px solid #ddd }}
th:first-child, td:first-child, td.text {{ text-align: left }}
</style></head><body>
<h1>mlx_vlm_prune: what was measured</h1>
<div class="figures">
{figures}
</div>
{sections}
</body></html>
"""


def dashboard(figures: Sequence[PlannedFigure], results: Sequence[Measured], folder: Path) -> str:
    """The page; FOLDER has the figures as PNG."""
    pictures = "\n".join(_picture(figure, folder) for figure in figures)
    return PAGE.format(figures=pictures, sections="\n".join(map(_section, results)))


def _picture(figure: PlannedFigure, folder: Path) -> str:
    data = base64.b64encode((folder / f"{figure.name}.png").read_bytes()).decode()
    title = escape(figure.title)
    return f'<figure><img alt="{title}" src="data:image/png;base64,{data}"></figure>'


def _section(result: Measured) -> str:
    """A result's table, with what it was measured on."""
    about, heads, rows = _sweep_table(result) if isinstance(result, Sweep) else _score_table(result)
    lines = ["".join(f"<th>{escape(head)}</th>" for head in heads)]
    for cells in rows:
        last = len(cells) - 1 if isinstance(result, Sweep) else -1
        lines.append("".join(
            f'<td{" class=text" if i == last else ""}>{escape(cell)}</td>'
            for i, cell in enumerate(cells)
        ))  # fmt: skip
    table = "".join(f"<tr>{line}</tr>\n" for line in lines)
    return (
        f"<h2>{escape(result.name)}</h2>\n<p>{escape(result.where)}. {escape(about)}</p>\n"
        f"<table>\n{table}</table>"
    )


Table = tuple[str, Sequence[str], list[list[str]]]  # a sentence, headings, rows


def _sweep_table(sweep: Measured) -> Table:
    content = sweep.content
    images = len(content["images"])
    about = (
        f"{content['prompt']!r} about {images} image{'s' * (images != 1)}, {content['runs']} rounds"
        " each; medians."
    )
    heads = ("pruner", "tokens", "first token, ms", "total, ms", "tokens/s", "operations saved",
             "cache, MB", "same answer", "overlap", "answer")  # fmt: skip
    rows = []
    for row in sweep.rows:
        rate = row["tokens_per_second"]
        rows.append([
            label(row), str(row["tokens"]), f"{row['ms']['first_token']['median']:.1f}",
            f"{row['ms']['total']['median']:.1f}", f"{rate['median']:.1f}" if rate else "–",
            _percent(row["operations_saved"]), f"{row['cache_bytes'] / 1e6:.2f}",
            _percent(row["agreement"]["same"]), _percent(row["agreement"]["overlap"]),
            row["answers"][0]["text"] if images == 1 else "",
        ])  # fmt: skip
    return about, heads, rows


def _score_table(evaluation: Measured) -> Table:
    assert isinstance(evaluation, Evaluation)
    content = evaluation.content
    about = f"{content['count']} questions of {content['questions']}."
    heads = ("pruner", "tokens", evaluation.score_name, "loyalty")
    rows = [
        [label(row), str(row["tokens"]), f"{evaluation.factor * row['overall']:.1f}",
         _percent(row.get("loyalty"))]
        for row in evaluation.rows
    ]  # fmt: skip
    return about, heads, rows


def _percent(share: Any) -> str:
    return "–" if share is None else f"{100 * share:.1f}%"
