"""The page of all figures: one HTML file, with the pictures inside, that needs no server."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..evaluation.table import label
from .figures import PlannedFigure
from .measured import Encoding, Evaluation, Measured, Sweep

Table = tuple[str, Sequence[str], list[list[str]]]  # a sentence, headings, rows
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
th:first-child, td:first-child, .sweep td:last-child {{ text-align: left }}
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
    about, heads, rows = _table_of(result)
    lines = ["".join(f"<th>{escape(head)}</th>" for head in heads)]
    for cells in rows:
        lines.append("".join(f"<td>{escape(cell)}</td>" for cell in cells))
    table = "".join(f"<tr>{line}</tr>\n" for line in lines)
    kind = type(result).__name__.lower()
    return (
        f"<h2>{escape(result.name)}</h2>\n<p>{escape(result.where)}. {escape(about)}</p>\n"
        f"<table class={kind}>\n{table}</table>"
    )


def _table_of(result: Measured) -> Table:
    if isinstance(result, Sweep):
        return _sweep_table(result)
    if isinstance(result, Evaluation):
        return _score_table(result)
    assert isinstance(result, Encoding)
    return _encode_table(result)


def _sweep_table(sweep: Sweep) -> Table:
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


def _score_table(evaluation: Evaluation) -> Table:
    content = evaluation.content
    about = f"{content['count']} questions of {content['questions']}."
    heads = ["pruner", "tokens", evaluation.score_name, "loyalty"]
    heads += ["first token, ms"] if evaluation.is_timed else []
    rows = []
    for row in evaluation.rows:
        cells = [label(row), str(row["tokens"]), f"{evaluation.factor * row['overall']:.1f}"]
        cells.append(_percent(row.get("loyalty")))
        if evaluation.is_timed:
            cells.append(f"{row['first_token_ms']['total']:.1f}")
        rows.append(cells)
    return about, heads, rows


def _encode_table(encoding: Encoding) -> Table:
    content = encoding.content
    about = f"{content['images']} images, {content['batch_size']} at once."
    heads = ["pruner", "tokens", "ms of an image", "images/s", "cosine"]
    scores = {"same_text": "same text", "accuracy": "right text"}
    present = [name for name in scores if name in encoding.full]
    rows = [
        [label(row), str(row["tokens"]), f"{row['ms']:.2f}", f"{1000 / row['ms']:.1f}",
         f"{row['cosine']:.4f}", *(_percent(row[name]) for name in present)]
        for row in encoding.rows
    ]  # fmt: skip
    return about, [*heads, *(scores[name] for name in present)], rows


def _percent(share: Any) -> str:
    return "–" if share is None else f"{100 * share:.1f}%"
