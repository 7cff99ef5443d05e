"""The command line that all benchmarks share: options, `--save`, the last line of JSON."""

import argparse
import datetime
import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mlx_vlm_prune.checkpoints.command_line import Parser, in_one_sentence, whole_number
from mlx_vlm_prune.checkpoints.reading.files import write_atomically
from mlx_vlm_prune.machine import blas

RESULTS = Path(__file__).parent / "results"
positive, natural = partial(whole_number, 1), partial(whole_number, 0)  # types of options


def parser(name: str, about: str | None, names_result: bool = False) -> Parser:
    """A benchmark's command line with its first option, `--save`.

    With `names_result` the option takes the name of the result, else that is the benchmark's.
    """
    p = Parser(f"benchmarks.{name}", description=(about or "").split("\n\n")[0])
    if names_result:
        p.add_argument("--save", metavar="NAME", type=plain_name,
                       help="keep as benchmarks/results/NAME.json (default: not kept)")  # fmt: skip
    else:
        p.add_argument("--save", action="store_const", const=name,
                       help=f"keep as benchmarks/results/{name}.json")  # fmt: skip
    return p


def plain_name(text: str) -> str:
    """An option that is a file's name, without folder or ending."""
    if not re.fullmatch(r"[\w.-]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no plain file name")
    return text


def run_command(
    parse: Callable[[Sequence[str] | None], argparse.Namespace],
    run: Callable[[argparse.Namespace], dict[str, Any]],
    argv: Sequence[str] | None = None,
) -> None:
    """Parse, run, save the result if `--save` is given, and print it as one line of JSON, the last.

    A UserError is printed in one sentence; the exit code is then 2.
    """
    with in_one_sentence():
        args = parse(argv)
        blas.load()  # reports a BLAS that the user named and that cannot be loaded
        result = json.dumps({"date": datetime.date.today().isoformat()} | run(args))
        if args.save:
            RESULTS.mkdir(exist_ok=True)
            write_atomically(RESULTS / f"{args.save}.json", result + "\n")
        print(result)
