"""Which methods there are: `python -m mlx_vlm_prune pruners [NAME]`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .checkpoints.errors import Parser, UserError, in_one_sentence
from .pruners import METHODS, PRESETS
from .pruners.spec import nearest

WORDS = {
    "text", "last_attention", "next_attention", "text_attention", "twig_attention", "held_keys",
}  # fmt: skip
COLUMNS = ("name", "stage", "text-aware", "training-free", "source", "needs")


@dataclass(frozen=True)
class Entry:
    """What a method's file says of it."""

    name: str
    stage: str
    reads_words: bool
    is_learned: bool
    idea: str  # one sentence
    source: str  # arXiv number or repository, empty for a baseline
    needs: tuple[str, ...]
    options: dict[str, object]
    doc: str

    @property
    def cells(self) -> tuple[str, ...]:
        yes = {True: "yes", False: "no"}
        needs = ", ".join(self.needs) or "–"
        source = self.source or "–"
        return (
            self.name, self.stage, yes[self.reads_words], yes[not self.is_learned], source, needs,
        )  # fmt: skip


def entry(name: str) -> Entry:
    """The entry of a method of the table."""
    method = METHODS[name]
    found = re.search(r"arXiv:\d{4}\.\d{4,5}|github\.com/[\w.-]+/[\w-]+", method.doc)
    return Entry(
        name, method.stage.name.lower(), bool(WORDS & set(method.needs)),
        method.learned, " ".join(method.doc.split("\n\n")[0].split()),
        found[0] if found else "", tuple(method.needs), method.options, method.doc,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = Parser(
        prog="python -m mlx_vlm_prune pruners",
        description="List the methods, or tell of one what it does and what options it has.",
    )
    parser.add_argument("name", nargs="?", help="a method or preset")
    with in_one_sentence():
        show(parser.parse_args(argv).name)


def show(name: str | None) -> None:
    """Print the table, or one method."""
    if name in PRESETS:
        print(f"{name} is short for {PRESETS[name]}")
    elif name is None:
        rows = [COLUMNS, *(entry(method).cells for method in METHODS)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
        for row in rows:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))
        print("\nChains: NAME+NAME prunes at two stages; restore joins any of them. Presets:")
        for preset, chain in PRESETS.items():
            print(f"  {preset} = {chain}")
        print("python -m mlx_vlm_prune pruners NAME tells more of one.")
    elif name in METHODS:
        told = entry(name)
        print(told.doc, end="\n\n")
        print(f"Stage: {told.stage}. Needs: {', '.join(told.needs) or 'the tokens alone'}.")
        print("Options:" if told.options else "Options: none.")
        for key, default in told.options.items():
            print(f"  {key}={default:.4g}" if isinstance(default, float) else f"  {key}={default}")
    else:
        raise UserError(f"no pruner is called {name!r}; {nearest(name, [*METHODS, *PRESETS])}")
