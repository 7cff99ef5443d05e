"""The listing of the methods: `mlx-vlm-prune pruners [NAME]`."""

from collections.abc import Sequence

from ..checkpoints.command_line import Parser, in_one_sentence, program
from ..checkpoints.errors import UserError
from . import METHODS, PRESETS, Method
from .spec import suggestion

COLUMNS = ("name", "stage", "text-aware", "training-free", "source", "needs")


def cells(method: Method) -> tuple[str, ...]:
    """A method's line of the table."""
    yes = {True: "yes", False: "no"}
    return (
        method.name, method.stage.name.lower(), yes[method.reads_prompt], yes[not method.learned],
        method.source or "–", ", ".join(method.needs) or "–",
    )  # fmt: skip


def build_parser() -> Parser:
    """The command line of `pruners`."""
    parser = Parser(
        "mlx_vlm_prune.pruners",
        description="List the methods; with a name, explain that one and its options.",
    )
    parser.add_argument("name", nargs="?", help="a method or a preset (default: list all)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; a user's mistake ends in one sentence and exit code 2."""
    parser = build_parser()
    with in_one_sentence(parser):
        show(parser.parse_args(argv).name)


def show(name: str | None) -> None:
    """Print the table, or one method."""
    if name in PRESETS:
        print(f"{name} is short for {PRESETS[name]}")
    elif name is None:
        rows = [COLUMNS, *(cells(method) for method in METHODS.values())]
        widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
        for row in rows:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))
        print("\nChains: NAME+NAME prunes at two stages; restore joins any of them. Presets:")
        for preset, chain in PRESETS.items():
            print(f"  {preset} = {chain}")
        print(f"{program('mlx_vlm_prune.pruners')} NAME explains one.")
    elif name in METHODS:
        method = METHODS[name]
        needs = ", ".join(method.needs) or "the tokens alone"
        print(method.doc, end="\n\n")
        print(f"Stage: {method.stage.name.lower()}. Needs: {needs}.")
        print("Options:" if method.options else "Options: none.")
        for key, default in method.options.items():
            print(f"  {key}={default:.4g}" if isinstance(default, float) else f"  {key}={default}")
    else:
        raise UserError(f"no pruner is called {name!r}; {suggestion(name, [*METHODS, *PRESETS])}")
