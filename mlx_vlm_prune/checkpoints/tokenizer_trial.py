"""Tokenizers that are not surely quick: tried on every text in a process with limits, first.

Compiled code is not interrupted from inside: a process of its own can be ended.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .errors import UserError, reason

SECONDS = 10
BYTES = 1 << 32
# Letters, digits, white space and signs, also in long runs: what expressions stumble over.
SAMPLES = ("", "A red cube, 3 x 4 m.\n\n" * 20, "a" * 500, " " * 500, "ab1 " * 100, "0" * 500)
# Isolated, so that nothing in the user's folder is imported.
PROGRAM = """
import json, sys
sys.path.insert(0, sys.argv[1])
try:
    import resource
    seconds, size = int(sys.argv[3]), int(sys.argv[4])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
except (ImportError, ValueError, OSError):
    pass  # no such limits here; the time is limited from outside
from tokenizers import Tokenizer
try:
    tokenizer = Tokenizer.from_file(sys.argv[2])
    tokenizer.no_truncation()
    tokenizer.no_padding()
    for text in json.load(sys.stdin):
        for special in (False, True):
            tokenizer.encode(text, add_special_tokens=special)
except BaseException as problem:
    print(str(problem).strip() or type(problem).__name__)
    sys.exit(3)
"""


def try_tokenizer(file: Path, doubt: str, texts: Sequence[str]) -> None:
    """Build the tokenizer of a file and encode texts by it, in a process with limits.

    Raises UserError where that takes too long or too much memory, or fails; `doubt` says why it
    was tried.
    """
    import tokenizers

    home = Path(tokenizers.__file__).resolve().parents[1]
    limits = (str(SECONDS), str(BYTES))
    command = [sys.executable, "-I", "-c", PROGRAM, str(home), str(file.absolute()), *limits]
    try:
        done = subprocess.run(
            command, input=json.dumps([*texts]), capture_output=True, text=True, timeout=2 * SECONDS
        )
    except subprocess.TimeoutExpired:
        done = None
    if done and done.returncode == 3:
        raise UserError(f"{file} does not work: {reason(ValueError(done.stdout))}")
    if not done or done.returncode:
        raise UserError(
            f"{file}: {doubt}, and encoding a text took more than {SECONDS} s or {BYTES >> 30} GB"
        )


@contextmanager
def library_errors(where: str) -> Iterator[None]:
    """What the library raises in the block becomes a UserError, `where` and its first line: bare
    Exceptions, and panics, which are no Exceptions."""
    try:
        yield
    except BaseException as problem:
        if isinstance(problem, UserError) or not (
            is_panic(problem) or isinstance(problem, Exception)
        ):
            raise
        raise UserError(f"{where}: {reason(problem)}") from None


def is_panic(problem: BaseException) -> bool:
    """Is this how Rust code ends that meets what it never expected?"""
    return type(problem).__name__ == "PanicException"
