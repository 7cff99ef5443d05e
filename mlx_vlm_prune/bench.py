"""Run a benchmark of the clone of the repository that this package lies in.

mlx-vlm-prune bench device --quick
"""

import ast
import importlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from .checkpoints.clone import is_clone, package_beside
from .checkpoints.command_line import Parser, in_one_sentence, suggestion
from .checkpoints.errors import UserError

NEEDS_CLONE = (
    "the benchmarks are not installed with the package: clone its repository, and run this command"
    " there, or `python -m benchmarks.NAME`"
)


def build_parser() -> Parser:
    """The command line of `bench`; what follows a benchmark's name is that benchmark's own."""
    parser = Parser(
        "mlx_vlm_prune.bench",
        description="Run a benchmark; without a name list them. Needs a clone of the repository."
        " Options after the name go to the benchmark, for example: bench device --help.",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="name of the benchmark")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; a user's mistake ends in one sentence and exit code 2."""
    parser = build_parser()
    with in_one_sentence(parser):
        words = list(sys.argv[1:] if argv is None else argv)
        run(parser.parse_args(words[:1]).name, words[1:])


def run(name: str | None, arguments: Sequence[str]) -> None:
    """Run a benchmark with its arguments, or list all. Raises UserError where there is none."""
    package = package_beside("benchmarks") if is_clone() else None
    if package is None:
        raise UserError(NEEDS_CLONE)
    summaries = benchmark_summaries(package)
    if name is None:
        width = max(map(len, summaries))
        print("\n".join(f"{each:<{width}}  {text}" for each, text in summaries.items()))
        return
    module = name.replace("-", "_")
    if module not in summaries:
        raise UserError(f"no benchmark is called {name!r}; {suggestion(module, summaries)}")
    importlib.import_module(f"{package.__name__}.{module}").main(arguments)


def benchmark_summaries(package: ModuleType) -> dict[str, str]:
    """Of every benchmark that is a command, by name, the first sentence of its file."""
    summaries = {}
    for folder in package.__path__:
        for file in sorted(Path(folder).glob("*.py")):
            source = file.read_text(encoding="utf-8")
            if '\nif __name__ == "__main__":\n' in source:
                text = ast.get_docstring(ast.parse(source)) or ""
                summaries[file.stem] = re.sub(r"[:?]? `python -m .*", "", text.split("\n")[0])
    return summaries


if __name__ == "__main__":
    main()
