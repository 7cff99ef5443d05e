"""What the benchmarks share: what options may be, how a run ends, where it is kept."""

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mlx_vlm_prune import fast_blas
from mlx_vlm_prune.checkpoints.errors import in_one_sentence
from mlx_vlm_prune.checkpoints.files import write_atomically


def plain_name(text: str) -> str:
    """An option that is a file's name, without folder or ending."""
    if not re.fullmatch(r"[\w.-]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no plain file name")
    return text


def finish(
    argv: Sequence[str] | None,
    parse: Callable[[Sequence[str] | None], argparse.Namespace],
    run: Callable[[argparse.Namespace], dict[str, Any]],
    results: Path,
) -> None:
    """Run, keep what was found as `--save` says, and print it in one line of JSON, the last.

    A user's mistake ends in one sentence and exit code 2.
    """
    with in_one_sentence():
        args = parse(argv)
        fast_blas.load()  # says what is wrong with a library that the user named
        told = json.dumps(run(args))
        if args.save:
            results.mkdir(exist_ok=True)
            write_atomically(results / f"{args.save}.json", told + "\n")
        print(told)
