"""A sweep's result as a table of fixed width, with notes and, of one image, the answers below."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..machine.timing import times_text
from .table import Row, label

PARTS = ("image", "vision", "pruner", "prefill")
MOST_LETTERS = 70  # of an answer in a line


def table(result: Mapping[str, Any]) -> str:
    """The rows by budget, and the notes."""
    rows = result["rows"]
    cells = [[heading for heading, _ in COLUMNS], *([cell(row) for _, cell in COLUMNS]
             for row in rows)]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines, before = [_line(cells[0], widths)], None
    for row, texts in zip(rows, cells[1:], strict=True):
        if row["tokens"] != before:
            lines.append("")
        lines.append(_line(texts, widths))
        before = row["tokens"]
    return "\n".join([*lines, "", *_notes(result), *_answers(result)])


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    name, *figures = zip(cells, widths, strict=True)
    aligned = [f"{text:>{width}}" for text, width in figures]
    return "  ".join([f"{name[0]:<{name[1]}}", *aligned]).rstrip()


def _ms(part: str) -> Callable[[Row], str]:
    """Median and half of what lies between the deciles; – of a part that was not timed alone."""

    def cell(row: Row) -> str:
        if (ms := row["ms"][part]) is None:
            return "–"
        return f"{ms['median']:.1f} ±{(ms['p90'] - ms['p10']) / 2:.1f}"

    return cell


def _share(name: str, part: str = "") -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        value = (row[part] if part else row)[name]
        return "–" if value is None else f"{100 * value:.1f}%"

    return cell


def _gain(row: Row) -> str:
    return times_text(row["gain"]["first_token"]["realised"]) if "gain" in row else ""


def _rate(row: Row) -> str:
    rate = row["tokens_per_second"]
    return f"{rate['median']:.1f}" if rate else "–"


def _operations(row: Row) -> str:
    counts = row["operations"]
    return f"{counts['first_token'] / 1e9:.3g}" if counts else "–"


COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("pruner", label),
    ("tokens", lambda row: str(row["tokens"])),
    ("first token", _ms("first_token")),
    ("gain", _gain),
    *((part, _ms(part)) for part in PARTS),
    ("total", _ms("total")),
    ("tokens/s", _rate),
    ("G ops", _operations),
    ("saved", _share("operations_saved")),
    ("cache MB", lambda row: f"{row['cache_bytes'] / 1e6:.2f}"),
    ("same", _share("same", "agreement")),
    ("overlap", _share("overlap", "agreement")),
)


def _notes(result: Mapping[str, Any]) -> list[str]:
    rows = result["rows"]
    images, runs = rows[0]["images"], result["runs"]
    lines = [
        f"Milliseconds over {images} image{'s' * (images != 1)}, {runs} round{'s' * (runs != 1)}"
        " each: the median, ± half of what lies between the 10th and the 90th percentile.",
        "Gain: how many times as fast the first token came, all parts included, as in the full"
        " answer before it; ? where the ratios spread by more than they differ from 1.",
        f"G ops: 10^9 multiply-adds of {result['operations_cover']} up to the first token; saved:"
        " the share of them.",
        "Same: answers equal to that with all tokens; overlap: the tokens they share with it.",
    ]
    if any("keep_ratio" in row for row in rows):
        lines.append("Tokens: of an image, the mean over all.")
    for row in rows:
        if row["images"] < images:
            lines.append(f"{label(row)} with {row['tokens']} tokens: {row['images']} images only.")
    for refusal in result["refused"]:
        why = refusal["why"].removeprefix(refusal["pruner"] + ": ")
        lines.append(f"Refused: {_refused(refusal)}: {why}")
    return [*lines, *(f"Skipped: {message}" for message in result["skipped"])]


def _refused(refusal: Mapping[str, Any]) -> str:
    """The method, its budget and the image of a refusal, as far as it names them."""
    text, K = refusal["pruner"], refusal.get("tokens")
    if K is not None:
        text += f" with {K} tokens" if isinstance(K, int) else f" with {K:.0%} of the tokens"
    return text + (f" on {refusal['image']}" if "image" in refusal else "")


def _answers(result: Mapping[str, Any]) -> list[str]:
    """The answers about the image, where there is one alone."""
    rows = result["rows"]
    if rows[0]["images"] > 1:
        return []
    names = [f"{label(row)} {row['tokens']}" for row in rows]
    width = max(map(len, names))
    lines = ["", f"Answers to {_short(result['prompt'])!r}:"]
    for name, row in zip(names, rows, strict=True):
        lines.append(f"{name:<{width}}  {_short(row['answers'][0]['text'])}")
    return lines


def _short(text: str) -> str:
    """A text on one line, its end left out where it is long."""
    flat = " ".join(text.split())
    return flat if len(flat) <= MOST_LETTERS else flat[: MOST_LETTERS - 1] + "…"
