"""An evaluation's result as a table of fixed width, with notes below it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from . import bootstrap

MOST_KINDS = 8  # more do not fit into a line
MOST_LETTERS = 12  # of a column's title
LEAST_WIDTH = 8
NOT_SCORED = "Not scored: the files of answers are for the authors' evaluation or their server."
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """A figure of every row: `row[name]`, or `row[part][name]`."""

    heading: str
    name: str
    part: str = ""
    factor: float = 1
    form: str = ".1f"

    @property
    def width(self) -> int:
        return max(LEAST_WIDTH, len(self.title) + 2)

    @property
    def title(self) -> str:
        return self.heading[:MOST_LETTERS]

    def cell(self, row: Row) -> str:
        value = (row.get(self.part, {}) if self.part else row).get(self.name)
        return "– " if value is None else f"{self.factor * value:{self.form}}{mark(row, self.name)}"


def table(result: dict[str, Any]) -> str:
    """The rows by budget, the best first, and the notes."""
    columns = _columns(result)
    width = max(len(label(row)) for row in result["rows"])
    titles = "".join(f"{column.title + ' ':>{column.width}}" for column in columns)
    lines = [f"{'pruner':<{width}}  tokens{titles}".rstrip()]
    for tokens in sorted({row["tokens"] for row in result["rows"]}, reverse=True):
        at_budget = [row for row in result["rows"] if row["tokens"] == tokens]
        lines.append("")
        for row in sorted(at_budget, key=lambda row: -row.get("overall", row["loyalty"])):
            cells = "".join(f"{column.cell(row):>{column.width}}" for column in columns)
            lines.append(f"{label(row):<{width}}  {tokens:>6}{cells}".rstrip())
    return "\n".join([*lines, "", *_notes(result)])


def label(row: Row) -> str:
    """The method, with the policy of positions where one was given."""
    return " ".join([row["pruner"], *([row["positions"]] if "positions" in row else [])])


def _columns(result: dict[str, Any]) -> list[Column]:
    figures = result["rows"][0]
    factor = 100 if result["unit"] == "%" else 1
    kinds = list(result["kinds"]) if 1 < len(result["kinds"]) <= MOST_KINDS else []
    kinds = kinds if "overall" in figures else []
    extra_figures = figures.get("more", {})
    columns = [
        Column(result.get("metric", "overall"), "overall", factor=factor),
        *(Column(kind, kind, "accuracy", factor) for kind in kinds),
        *(Column(name, name, "more") for name in extra_figures),
        Column("loyalty", "loyalty", factor=100),
        Column("log-prob", "logprob", form=".3f"),
        *_timed_columns(figures),
    ]
    return [column for column in columns if column.part or column.name in figures]


def _timed_columns(row: Row) -> list[Column]:
    """Drafts and times, where the rows have them."""
    columns = []
    if "drafts" in row:
        columns += [
            Column("accepted", "accepted_share", "drafts", 100),
            Column("tokens/s", "tokens_per_second", "drafts"),
        ]
    if "first_token_ms" in row:
        columns.append(Column("first, ms", "total", "first_token_ms"))
    return columns


def mark(row: Row, name: str = "overall") -> str:
    """▲ or ▼ where the interval of the difference to `random` with the same budget excludes 0."""
    _, low, high = row.get("to_random", {}).get(name, (0, None, None))
    if low is None:
        return " "
    return "▲" if low > 0 else "▼" if high < 0 else " "


def _timed_notes(result: dict[str, Any]) -> list[str]:
    """What the columns of drafts and times are."""
    row, lines = result["rows"][0], []
    if result.get("metric"):
        lines.append(f"{result['metric']}: 100 times its mean, as papers print it.")
    if "drafts" in row:
        lines.append("Accepted: of the drafted tokens, in %. Tokens/s: after the first token.")
    if "first_token_ms" in row:
        lines.append(
            "First, ms: the median time to the first token of single requests, with picture, tower"
            " and pruner."
        )
    return lines


def _notes(result: dict[str, Any]) -> list[str]:
    unit = ", in %" if result["unit"] == "%" else ""
    count = result["count"]
    lines = [
        f"{count} question{'s' * (count != 1)} ({result['format']}){unit}. Loyalty:"
        " the same answer as with all tokens, in %. Log-prob: of the right answer, its mean.",
        "▲ ▼: above or below random with as many tokens (95 % interval, paired bootstrap).",
    ]
    if "overall" not in result["rows"][0]:
        lines[1] = NOT_SCORED
    elif count < bootstrap.FEWEST:
        lines[1] = f"Fewer than {bootstrap.FEWEST} questions: no interval, and nothing to conclude."
    lines += _timed_notes(result)
    if any("keep_ratio" in row for row in result["rows"]):
        lines.append("Tokens: of an image or a clip, the mean over all.")
    for K in sorted({row["keep_tokens"] for row in result["rows"] if "keep_tokens" in row}):
        lines.append(f"Of {K} tokens: an image that has fewer keeps all; the mean is shown.")
    for row in (row for row in result["rows"] if "kept" in row):
        lines.append(f"{label(row)} at {row['tokens']} kept {row['kept']:g} of an image, the mean.")
    if len(result["kinds"]) > MOST_KINDS:
        lines.append(f"The {len(result['kinds'])} kinds of question are listed in the file.")
    for source in result.get("earlier", ()):
        lines.append(f"Rows of {source['file']}: {source['rows']}, measured on {source['date']}.")
    if part := result.get("part"):
        lines.append(f"A first look: --all asks all {' and '.join(part)}.")
    for alike in result.get("alike", ()):
        *names, last = alike["pruners"]
        budgets = ", ".join(map(str, alike["tokens"]))
        lines.append(f"One and the same choice: {', '.join(names)} and {last} ({budgets}).")
    return [*lines, *_worse_than_random(result), *_left_out(result)]


def _worse_than_random(result: dict[str, Any]) -> list[str]:
    worse: dict[str, list[str]] = {}
    for row in result["rows"]:
        if mark(row) == "▼":
            worse.setdefault(label(row), []).append(str(row["tokens"]))
    named = [f"{name} ({', '.join(tokens)})" for name, tokens in worse.items()]
    return [f"Worse than random: {', '.join(named)}."] if named else []


def _left_out(result: dict[str, Any]) -> list[str]:
    lines = []
    for refusal in result["refused"]:
        name, K, why = refusal["pruner"], refusal["tokens"], refusal["why"]
        amount = f"{K} tokens" if isinstance(K, int) else f"{K:.0%} of the tokens"
        lines.append(f"Not asked: {name} with {amount}: {why.removeprefix(name + ': ')}")
    return [*lines, *(f"Skipped: {message}" for message in result["skipped"])]
