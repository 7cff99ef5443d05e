"""Write docs/fidelity.md, each method beside its authors' code: `python -m benchmarks.fidelity`.

Repositories and differences come from each method's file, the inputs from tests/authors. Nothing on
the page is written by hand.
"""

from collections.abc import Sequence
from math import prod

from mlx_vlm_prune.checkpoints.command_line import Parser, in_one_sentence
from mlx_vlm_prune.checkpoints.reading.files import read_json, write_atomically
from mlx_vlm_prune.pruners import METHODS, Method, Stage

from .command_line import RESULTS
from .readme_tables import markdown
from .report import ROOT, link

PAGE, AUTHORS = ROOT / "docs" / "fidelity.md", ROOT / "tests" / "authors"
HEAD = """# The methods beside their authors' code

The authors' own selection code was run in float64, outside this repository, on inputs made by
formulas (`tests/author_inputs.py`) without near ties. `tests/authors` holds what it kept. The tests
compare both of our versions with it: MLX in float64 and in float32, and `torch_ref` in float64.
They compare the tokens kept and, where a method merges, the features of each slot; for `restore`
also what it adds to attention.

On all of these inputs both are the same. Each method's list says where it differs on other inputs,
or in parts that the inputs leave out, and which option does it as the authors do. Choices were
compared, not models and answers. Methods before the language model keep the tokens' positions; the
authors' code for LLaVA renumbers them (`--positions renumber`). Both are measured below.

This page is made from these files and the methods' own (`python -m benchmarks.fidelity`).
`python -m mlx_vlm_prune pruners NAME` prints a method's part."""


def page() -> str:
    """The text of docs/fidelity.md."""
    compared = [method for method in METHODS.values() if method.authors_code]
    others = [method for method in METHODS.values() if not method.authors_code]
    heads = ["method", "paper", "authors' code", "same on inputs", "N", "K", "run with"]
    return "\n\n".join([
        HEAD, markdown(heads, "lllrrrl", map(row, compared)),
        "## Alike, and different",
        *map(section, compared),
        "## Positions",
        positions(),
        "## Not compared",
        "Baselines, and methods that no public code has, though a README describes them"
        " (`kq_norm`, `attention_pool`, `score_prune`, `mlp`):",
        "\n".join(f"- `{m.name}`{f' ({link(m.source)})' if m.source else ''}" for m in others),
    ]) + "\n"  # fmt: skip


def row(method: Method) -> list[str]:
    """A method's row: on how many inputs it is as its authors' code, and on which."""
    cases = read_json(AUTHORS / f"{method.name}.json")["cases"]
    options = {case["spec"].partition(":")[2].partition("=")[0] for case in cases} - {""}
    return [
        f"`{method.name}`", link(method.source), code_link(method.authors_code), str(len(cases)),
        span([prod(case["grid"]) for case in cases]), span([case["K"] for case in cases]),
        ", ".join(f"`{option}`" for option in sorted(options)) or "defaults",
    ]  # fmt: skip


def positions() -> str:
    """Accuracy on scenes with kept positions and counted on, of methods before the decoder."""
    result = read_json(RESULTS / "positions.json")
    overall = {
        (row["pruner"], row["tokens"], row["positions"]): row["overall"]
        for row in result["rows"]
        if "positions" in row
    }
    budgets = list(dict.fromkeys(K for _, K, _ in overall))
    names = [
        name
        for name, method in METHODS.items()
        if method.stage < Stage.DECODER and all((name, K, "renumber") in overall for K in budgets)
    ]
    lines, both = [], ("keep", "renumber")
    for name in names:
        shares = [[overall[name, K, policy] for policy in both] for K in budgets]
        lines.append([f"`{name}`", *(f"{kept:.1%} → {counted:.1%}" for kept, counted in shares)])
    means = [
        sum(overall[n, K, "renumber"] - overall[n, K, "keep"] for n in names) / len(names)
        for K in budgets
    ]
    lines.append(["mean of the differences", *(f"{100 * mean:+.1f} points" for mean in means)])
    text = (
        f"Right answers to {result['count']} questions about scenes, positions kept → counted on"
        " (`python -m mlx_vlm_prune.evaluate --all --per-kind 40 --positions keep --positions"
        " renumber`)."
    )
    heads = ["method", *(f"{K} tokens" for K in budgets)]
    return "\n\n".join([text, markdown(heads, "l" + "r" * len(budgets), lines)])


def span(numbers: Sequence[int]) -> str:
    """The least and the largest of some numbers."""
    return " to ".join(map(str, sorted({min(numbers), max(numbers)})))


def code_link(code: str) -> str:
    """OWNER/NAME@COMMIT as a Markdown link."""
    repository, _, commit = code.partition("@")
    return f"[{code}](https://github.com/{repository}/tree/{commit})"


def section(method: Method) -> str:
    """In what a method is as its authors' code, what was read into that code, what differs."""
    alike, differences = method.fidelity
    note = read_json(AUTHORS / f"{method.name}.json").get("note")
    parts = [f"### `{method.name}`", alike, *([f"In what was run: {note}."] if note else [])]
    return "\n\n".join(
        [*parts, "\n".join(f"- {each}" for each in differences or ["no difference"])]
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; a UserError ends in one sentence and exit code 2."""
    parser = Parser("benchmarks.fidelity", description=(__doc__ or "").split("\n")[0])
    with in_one_sentence():
        parser.parse_args(argv)
        write_atomically(PAGE, page())


if __name__ == "__main__":
    main()
