"""`python -m mlx_vlm_prune COMMAND …`: hand over to the command's own module."""

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType

from .checkpoints.errors import UserError, in_one_sentence
from .machine.version import __version__

# Each command's module; the converter is no part of this package.
COMMANDS = {
    "advise": "advise", "convert": None, "evaluate": "evaluate", "generate": "generate",
    "pruners": "pruners.listing",
}  # fmt: skip
USAGE = """usage: python -m mlx_vlm_prune COMMAND …

commands:
  advise     whether pruning pays, for this model on this machine
  convert    trained weights from PyTorch to MLX and back
  evaluate   what each method costs in answers, over a set of questions
  generate   answer a prompt about images with fewer visual tokens
  pruners    list the methods; with a name, tell more of one

python -m mlx_vlm_prune COMMAND --help says more; --version prints the version."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; without a known one, print the usage and exit with code 2."""
    with in_one_sentence():
        _run(*(list(sys.argv[1:] if argv is None else argv) or [""]))


def _run(command: str, *rest: str) -> None:
    if command in COMMANDS:
        module = COMMANDS[command]
        home = importlib.import_module(f".{module}", __package__) if module else _converter()
        home.main(list(rest))
    elif command in ("-h", "--help"):
        print(USAGE)
    elif command == "--version":
        print(f"mlx_vlm_prune {__version__}")
    else:
        print(USAGE, file=sys.stderr)
        if command:
            print(f"error: no command is called {command!r}", file=sys.stderr)
        sys.exit(2)


def _converter() -> ModuleType:
    """The command line of the converter that lies beside this package.

    `import convert` would take, and execute, a convert.py in the user's folder before it.
    """
    home = Path(__file__).parents[1]
    spec = PathFinder.find_spec("convert", [str(home)])
    if spec is None or spec.loader is None:
        raise UserError(f"there is no converter in {home}, where mlx_vlm_prune lies")
    sys.modules["convert"] = package = module_from_spec(spec)
    spec.loader.exec_module(package)
    return importlib.import_module("convert.__main__")


if __name__ == "__main__":
    main()
