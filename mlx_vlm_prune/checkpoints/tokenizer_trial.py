"""Tokenizers that are not surely quick: tried on every text in a process with limits, first.

Compiled code is not interrupted from inside: a process of its own can be ended.
"""

import json
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from .errors import UserError, reason

logger = logging.getLogger("mlx_vlm_prune")
SECONDS = 10
BYTES = 1 << 32
POLL_SECONDS = 0.2  # between two looks at the memory
BOUNDS_MEMORY = sys.platform != "darwin"  # does the system, by RLIMIT_AS?
QUIET_SECONDS = 2  # before a note says what is waited for
# Letters, digits, white space and signs, also in long runs: what expressions stumble over.
SAMPLES = ("", "A red cube, 3 x 4 m.\n\n" * 20, "a" * 500, " " * 500, "ab1 " * 100, "0" * 500)
MOST_PASSED = 256  # texts that are remembered
# Isolated, so that nothing in the user's folder is imported.
PROGRAM = """
import json, sys
sys.path.insert(0, sys.argv[1])
try:
    import resource
    seconds, size = int(sys.argv[3]), int(sys.argv[4])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
except (ImportError, ValueError, OSError):
    pass  # no such limits here; from outside time is limited, and on macOS memory
from tokenizers import Tokenizer
try:
    tokenizer = Tokenizer.from_file(sys.argv[2])
    tokenizer.no_truncation()
    tokenizer.no_padding()
    for text in json.load(sys.stdin):
        for special in (False, True):
            tokenizer.encode(text, add_special_tokens=special)
except MemoryError:
    sys.exit(4)
except BaseException as problem:
    print(json.dumps(str(problem).strip() or type(problem).__name__))
    sys.exit(3)
"""
FAULT, NO_MEMORY = 3, 4  # its exit codes
ALLOCATION = "memory allocation of"  # what Rust prints before it aborts


@dataclass(frozen=True)
class TokenizerTrial:
    """The tokenizer of a file that is not surely quick, for the reason in `doubt`: a text is tried
    in a process with limits before it is encoded, and only once."""

    file: Path
    doubt: str
    passed: set[str] = field(default_factory=lambda: {*SAMPLES})

    def check(self, text: str) -> None:
        """Raises UserError where encoding it takes too much, or fails."""
        if text in self.passed:
            return
        try_tokenizer(self.file, self.doubt, [text])
        if len(self.passed) >= MOST_PASSED:
            self.passed.clear()
        self.passed.add(text)


def try_tokenizer(file: Path, doubt: str, texts: Sequence[str]) -> None:
    """Build the tokenizer of a file and encode texts by it, in a process with limits.

    Raises UserError where that takes too long or too much memory, or fails; `doubt` says why it
    was tried.
    """
    import tokenizers

    home = Path(tokenizers.__file__).resolve().parents[1]
    limits = (str(SECONDS), str(BYTES))
    command = [sys.executable, "-I", "-c", PROGRAM, str(home), str(file.absolute()), *limits]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        encoding="utf-8", errors="replace",
    ) as process:  # fmt: skip
        try:
            end, output = _watch(process, json.dumps([*texts]), file)
        finally:
            process.kill()
    if end:
        raise UserError(f"{file}: {doubt}, and encoding a text {end}")
    if process.returncode == FAULT:
        raise UserError(f"{file} does not work: {reason(ValueError(json.loads(output)))}")
    if process.returncode:
        last = (output.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        raise UserError(f"{file} could not be tried: {reason(ValueError(last))}")


def _watch(process: subprocess.Popen[str], texts: str, file: Path) -> tuple[str | None, str]:
    """Until the process ends: which limit it passed, or what ended it, as the end of a sentence;
    and what it printed."""
    begin, unread, is_noted = time.monotonic(), texts, False
    too_long, too_much = f"took more than {SECONDS} s", f"took more than {BYTES >> 30} GB"
    while True:
        try:
            stdout, stderr = process.communicate(unread, POLL_SECONDS)
            break
        except subprocess.TimeoutExpired:
            unread = ""  # what was given is written on
        seconds = time.monotonic() - begin
        if seconds > 2 * SECONDS:
            return too_long, ""
        if seconds > QUIET_SECONDS and not is_noted:
            logger.info("trying %s in a process with limits, since it may be slow", file)
            is_noted = True
        if not BOUNDS_MEMORY and _resident_bytes(process.pid) > BYTES:
            return too_much, ""
    code = process.returncode
    if code == -signal.SIGXCPU:
        return too_long, ""
    if code in (NO_MEMORY, -signal.SIGKILL) or (code < 0 and ALLOCATION in stderr):
        return too_much, ""
    if code < 0:
        return f"ended in {signal.Signals(-code).name}", ""
    return None, stdout if code == FAULT else stderr


def _resident_bytes(process: int) -> int:
    """The memory that a process holds; 0 where nobody says."""
    ps = subprocess.run(["ps", "-o", "rss=", "-p", str(process)], capture_output=True, text=True)
    kilobytes = ps.stdout.strip()
    return 1024 * int(kilobytes) if kilobytes.isdigit() else 0


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
