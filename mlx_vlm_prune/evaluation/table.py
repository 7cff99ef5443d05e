"""An evaluation's result for people: a table of fixed width, and what stands out in it."""

from dataclasses import dataclass
from typing import Any

from . import bootstrap

MOST_KINDS = 8  # more do not fit into a line
LONGEST = 12  # letters of a column's head
NARROWEST = 8
Told = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """A figure of every row: `name` of the row itself, or of `part` of it."""

    head: str
    name: str
    part: str = ""
    factor: float = 1
    form: str = ".1f"

    @property
    def width(self) -> int:
        return max(NARROWEST, len(self.title) + 2)

    @property
    def title(self) -> str:
        return self.head[:LONGEST]

    def cell(self, row: Told) -> str:
        value = (row[self.part] if self.part else row)[self.name]
        return f"{self.factor * value:{self.form}}{mark(row, self.name)}"


def table(told: Told) -> str:
    """Rows by budget, the best first; then who loses to random, and who could not be asked."""
    columns = _columns(told)
    wide = max(len(row["pruner"]) for row in told["rows"])
    heads = "".join(f"{column.title + ' ':>{column.width}}" for column in columns)
    lines = [f"{'pruner':<{wide}}  tokens{heads}".rstrip()]
    for tokens in sorted({row["tokens"] for row in told["rows"]}, reverse=True):
        own = [row for row in told["rows"] if row["tokens"] == tokens]
        lines.append("")
        for row in sorted(own, key=lambda row: -row["overall"]):
            cells = "".join(f"{column.cell(row):>{column.width}}" for column in columns)
            lines.append(f"{row['pruner']:<{wide}}  {tokens:>6}{cells}".rstrip())
    return "\n".join([*lines, "", *_notes(told)])


def _columns(told: Told) -> list[Column]:
    factor = 100 if told["unit"] == "%" else 1
    kinds = list(told["kinds"]) if 1 < len(told["kinds"]) <= MOST_KINDS else []
    more = told["rows"][0].get("more", {})
    return [
        Column("overall", "overall", factor=factor),
        *(Column(kind, kind, "accuracy", factor) for kind in kinds),
        *(Column(name, name, "more") for name in more),
        Column("loyalty", "loyalty", factor=100),
        Column("log-prob", "logprob", form=".3f"),
    ]


def mark(row: Told, name: str = "overall") -> str:
    """Above or below `random` at the same budget, where there is an interval that says so."""
    _, low, high = row.get("to_random", {}).get(name, (0, None, None))
    if low is None:
        return " "
    return "▲" if low > 0 else "▼" if high < 0 else " "


def _notes(told: Told) -> list[str]:
    unit = ", in %" if told["unit"] == "%" else ""
    lines = [
        f"{told['count']} question{'s' * (told['count'] != 1)} ({told['format']}){unit}. Loyalty:"
        " the same answer as with all tokens, in %. Log-prob: of the right answer, its mean.",
        "▲ ▼: above or below random with as many tokens (95 % interval, paired bootstrap).",
    ]
    if any("keep_ratio" in row for row in told["rows"]):
        lines.append("Tokens: of an image, the mean over all.")
    for K in sorted({row["keep_tokens"] for row in told["rows"] if "keep_tokens" in row}):
        lines.append(f"Of {K} tokens: an image that has fewer keeps all; the mean is shown.")
    if told["count"] < bootstrap.FEWEST:
        lines[1] = f"Fewer than {bootstrap.FEWEST} questions: no interval, and nothing to conclude."
    if len(told["kinds"]) > MOST_KINDS:
        lines.append(f"The {len(told['kinds'])} kinds of question are told apart in the file.")
    worse: dict[str, list[str]] = {}
    for row in told["rows"]:
        if mark(row) == "▼":
            worse.setdefault(row["pruner"], []).append(str(row["tokens"]))
    if worse:
        named = [f"{name} ({', '.join(tokens)})" for name, tokens in worse.items()]
        lines.append(f"Worse than random: {', '.join(named)}.")
    for one in told["refused"]:
        kept = one["tokens"]
        amount = f"{kept} tokens" if isinstance(kept, int) else f"{kept:.0%} of the tokens"
        who = f"{one['pruner']} with {amount}"
        lines.append(f"Not asked: {who}: {one['why'].removeprefix(one['pruner'] + ': ')}")
    return [*lines, *(f"Skipped: {what}" for what in told["skipped"])]
