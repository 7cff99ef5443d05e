"""The listing of the methods: `mlx-vlm-prune pruners [NAME]`."""

from collections.abc import Sequence
from textwrap import fill

from ..checkpoints.command_line import Parser, in_one_sentence, program
from . import METHODS, PRESETS, Method, register_installed
from .auto.reasons import CAUTIOUS, DOCUMENT, PUBLISHED
from .image_budgets import REFERENCE
from .method import AUTHORS_CODE
from .own_methods import register_files
from .spec import AUTO, unknown_pruner

COLUMNS = ("name", "stage", "text-aware", "training-free", "source", "needs")
WIDTH = 100  # characters of a line
AUTO_RULE = (
    "Choose by the last evaluation of the very model; without one, by the first of these lines that"
    " fits the model. Prune nothing where all tokens stay or, by the calibrations of this machine,"
    " no time is gained. docs/auto.md says more."
)


def table_row(method: Method) -> tuple[str, ...]:
    """A method's row of the table."""
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
    parser.add_argument(
        "name",
        nargs="?",
        help="a method, a preset, or a file with a method of your own (default: list all)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; a user's mistake ends in one sentence and exit code 2."""
    parser = build_parser()
    with in_one_sentence(parser):
        show(parser.parse_args(argv).name)


def show(name: str | None) -> None:
    """Print the table, or one method."""
    name = name and register_files(name)
    problems = register_installed(name and [name])
    if name == AUTO:
        _print_auto()
    elif name is None:
        _print_all()
        print("".join(f"\n{problem}" for problem in problems), end="\n" if problems else "")
    elif name in PRESETS:
        print(f"{name} is short for {PRESETS[name]}")
    elif name in METHODS:
        _print_one(METHODS[name])
    else:
        raise unknown_pruner(name, [*METHODS, *PRESETS])


def _print_all() -> None:
    _print_columns([COLUMNS, *(table_row(method) for method in METHODS.values())])
    print("\nChains: NAME+NAME prunes at two stages, NAME:keep=N leaves N tokens to the next, or a")
    print("share of them below 1; restore joins any of them.")
    print(
        "NAME:budget=similarity, after the tower, keeps K x (1 - mean cosine of the image's tokens)"
    )
    print(f"/ {REFERENCE:g}, where {REFERENCE:g} is the option reference. The column needs has the")
    print("signals of the model that a method reads beside the tokens. Presets:")
    for preset, chain in PRESETS.items():
        print(f"  {preset} = {chain}")
    print(f"\n{AUTO} is no method: it chooses one for a model and a budget, and says why.")
    print("\nSome can be one and the same choice. In a tower without a CLS token cls_attention is")
    print("received_attention. So is hiprune where it keeps at most 25 tokens.")
    print(f"{program('mlx_vlm_prune.pruners')} NAME explains one.")


def _print_one(method: Method) -> None:
    needs = ", ".join(method.needs) or "the tokens alone"
    paragraphs = method.description.split("\n\n")
    print("\n\n".join(p for p in paragraphs if not AUTHORS_CODE.search(p)), end="\n\n")
    print(f"Stage: {method.stage.name.lower()}. Needs: {needs}.")
    _print_fidelity(method)
    print("Options:" if method.options else "Options: none.")
    _print_columns(options(method), indent="  ")


def _print_fidelity(method: Method) -> None:
    alike, differences = method.fidelity
    print(fill(alike or "Not compared with code of its authors.", WIDTH))
    if differences:
        print("Differs:")
    for difference in differences:
        print(fill(difference, WIDTH, initial_indent="  - ", subsequent_indent="    "))


def options(method: Method) -> list[tuple[str, str]]:
    """Each option with its default, as it is typed, and what it means."""
    defaults = {
        name: f"{default:g}" if isinstance(default, float) else str(default).lower()
        for name, default in method.options.items()
    }
    return [(f"{name}={text}", method.option_help.get(name, "")) for name, text in defaults.items()]


def _print_auto() -> None:
    print(fill(AUTO_RULE, WIDTH), end="\n\n")
    for line in PUBLISHED:
        print(fill(f"{line.pruner} ({line.models}): {line.why}. Source: {line.source}.", WIDTH))
    print()
    for subject in (*CAUTIOUS, DOCUMENT):
        start = f"More stays for {subject.subject}: {subject.why}. Source: {subject.source}."
        print(fill(start, WIDTH))


def _print_columns(rows: Sequence[tuple[str, ...]], indent: str = "") -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print((indent + line).rstrip())
