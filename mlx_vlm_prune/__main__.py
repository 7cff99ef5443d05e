"""`python -m mlx_vlm_prune COMMAND …`: hand over to the command's own module."""

import importlib
import sys
from collections.abc import Sequence

from . import __version__
from .checkpoints.errors import in_one_sentence

# Each command's module.
COMMANDS = {
    "advise": "advise", "evaluate": "evaluate", "generate": "generate", "pruners": "listing",
}  # fmt: skip
USAGE = """usage: python -m mlx_vlm_prune COMMAND …

commands:
  advise     whether pruning pays, for this model on this machine
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
        importlib.import_module(f".{COMMANDS[command]}", __package__).main(list(rest))
    elif command in ("-h", "--help"):
        print(USAGE)
    elif command == "--version":
        print(f"mlx_vlm_prune {__version__}")
    else:
        print(USAGE, file=sys.stderr)
        if command:
            print(f"error: no command is called {command!r}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
