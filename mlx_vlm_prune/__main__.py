"""`mlx-vlm-prune COMMAND …` and `python -m mlx_vlm_prune COMMAND …`: run the command's module."""

import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

from .checkpoints import clone
from .checkpoints.command_line import PACKAGE, VERSION, in_one_sentence, program
from .checkpoints.errors import UserError

# Each command's module; the converter is no part of this package.
COMMANDS = {
    "advise": "advise", "app": "app", "bench": "bench", "chat": "chat", "convert": None,
    "encode": "encode", "evaluate": "evaluate", "explore": "explore", "fuse": "fuse",
    "generate": "generate",
    "new-method": "new_method", "plot": "plot", "pruners": "pruners.listing", "scan": "scan",
    "serve": "serve", "sweep": "sweep", "train": "train",
}  # fmt: skip
USAGE = """usage: {program} COMMAND …

commands:
  advise     say whether pruning pays, for a model on this machine
  app        chat about pictures in a browser, full and pruned answers side by side
  bench      run a benchmark of a clone of the repository
  chat       talk about images in several turns, with fewer visual tokens
  convert    convert trained weights from PyTorch to MLX and back
  encode     encode images by a CLIP or SigLIP with fewer visual tokens
  evaluate   measure what each method costs in accuracy, on a set of questions
  explore    write a page that shows what methods kept of your images
  fuse       write a trained model's adapters into its weights
  generate   answer a prompt about images with fewer visual tokens
  new-method write the two files of a method of your own, to change
  plot       draw what sweep, evaluate and encode have measured
  pruners    list the methods; with a name, explain that one
  scan       measure scans of Mamba and attention, from short to long prompts
  serve      answer requests over HTTP as OpenAI's API has them, each with its own budget
  sweep      measure methods at several budgets on your own images
  train      train a model, a pruner, adapters or a twig on your own pictures

{program} COMMAND --help lists its options; --version prints the version."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; without a known one, print the commands and exit with code 2."""
    with in_one_sentence():
        _run(*(list(sys.argv[1:] if argv is None else argv) or [""]))


def _run(command: str, *rest: str) -> None:
    usage = USAGE.format(program=program(PACKAGE))
    if command in COMMANDS:
        module = COMMANDS[command]
        home = importlib.import_module(f".{module}", __package__) if module else _converter()
        home.main(list(rest))
    elif command in ("-h", "--help"):
        print(usage)
    elif command == "--version":
        print(VERSION)
    else:
        print(usage, file=sys.stderr)
        if command:
            print(f"error: no command is called {command!r}", file=sys.stderr)
        sys.exit(2)


def _converter() -> ModuleType:
    """The command line of the converter that lies beside this package."""
    if clone.package_beside("convert") is None:
        raise UserError(f"there is no converter in {clone.HOME}, where mlx_vlm_prune lies")
    return importlib.import_module("convert.__main__")


if __name__ == "__main__":
    main()
