"""What a user did wrong, in one sentence: what, where, and what is allowed."""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


class UserError(ValueError):
    """A mistake of the user's. Command lines print it after `error:` and exit with code 2."""


# What is installed apart: by the name it is imported by, the extra that brings it.
EXTRAS = {
    "matplotlib": "plot", "mlx_lm": "mlx-lm", "mlx_vlm": "mlx-vlm", "pyarrow": "parquet",
    "torch": "torch",
}  # fmt: skip


def lacks(package: str, what: object = "this command") -> UserError:
    """The mistake of going without a package that `what` needs; how to get it."""
    install = f"pip install 'mlx_vlm_prune[{EXTRAS[package]}]'"
    return UserError(f"{what} needs {package}, which is not installed: {install}")


class Parser(argparse.ArgumentParser):
    """A command line that refuses in one sentence, too."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (--help lists what there is)\n")


def reason(problem: BaseException) -> str:
    """The first line of what an exception of another library says, or else its name."""
    return (str(problem).strip() or type(problem).__name__).splitlines()[0]


def whole(least: int, text: str, most: int | None = None) -> int:
    """An option that is a whole number; `partial` it for a parser."""
    if not text.isdecimal() or int(text) < least or (most is not None and int(text) > most):
        to = "on" if most is None else f"to {most}"
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} {to}")
    return int(text)


@contextmanager
def in_one_sentence() -> Iterator[None]:
    """How a command ends: of a mistake, a package that is not installed, or a file that cannot be
    written, in one sentence and exit code 2; of an interrupt in 130; in silence where a reader such
    as `head` has enough."""
    try:
        yield
        print(end="", flush=True)  # a reader may be gone, or there may be none
    except UserError as e:
        _refuse(str(e))
    except ModuleNotFoundError as e:
        package = (e.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        _refuse(str(lacks(package)))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as e:
        _refuse(f"{e.filename or 'output'}: {e.strerror or e}")
    except KeyboardInterrupt:
        sys.exit(130)


def _refuse(sentence: str) -> NoReturn:
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(2)
