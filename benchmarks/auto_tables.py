"""The tables of docs/auto.md, and what the package ships of the built-in model's evaluation."""

import html
import json
import re
from pathlib import Path

from mlx_vlm_prune.pruners.auto.reasons import CAUTIOUS, DOCUMENT, PUBLISHED

from .readme_tables import markdown, read

SHIPPED = ("pruner", "tokens", "of", "overall")  # of a row


def auto_order_table(results: Path) -> str:
    """The published order of `auto`, in Markdown."""
    lines = [
        [line.models, f"`{line.pruner}`", line.why, linked_sources(line.source)]
        for line in PUBLISHED
    ]
    return markdown(("for", "method", "why", "source"), "llll", lines)


def auto_caution_table(results: Path) -> str:
    """The prompts for which `auto` keeps more, in Markdown."""
    lines = []
    for line in (*CAUTIOUS, DOCUMENT):
        words = ", ".join(map(_code, line.words)) or "– (the picture says it)"
        lines.append([line.subject, words, line.why, linked_sources(line.source)])
    return markdown(("for", "words (regular expressions)", "why", "source"), "llll", lines)


def _code(expression: str) -> str:
    """A regular expression as code in a table, where a vertical bar would end the cell."""
    if "|" not in expression:
        return f"`{expression}`"
    return f"<code>{html.escape(expression).replace('|', '&#124;')}</code>"


def linked_sources(sources: str) -> str:
    """Sources in which arXiv's numbers and repositories are links."""
    linked = re.sub(r"arXiv:(\d{4}\.\d{5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", sources)
    return re.sub(r"(github\.com/[\w-]+/[\w-]+)", r"[\1](https://\1)", linked)


def shipped_evaluation(results: Path) -> str:
    """What an installation knows of the built-in model: the figures of its evaluation, a row a
    line."""
    result = read(results, "scenes")
    about = {name: result[name] for name in ("questions", "count", "date", "model_key")}
    rows = [json.dumps({name: row[name] for name in SHIPPED}) for row in result["rows"]]
    head = json.dumps(about, indent=4).removesuffix("\n}")
    return f'{head},\n    "rows": [\n        ' + ",\n        ".join(rows) + "\n    ]\n}\n"
