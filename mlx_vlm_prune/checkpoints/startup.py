"""Ctrl-C before a command has begun, while its modules are imported: exit code 130, no traceback.

It imports nothing that takes time: the package imports it first of all.
"""

import os
import signal
import sys
import threading
from typing import Any

SCRIPTS = ("mlx-vlm-prune", "mlx_vlm_prune.generate")
PACKAGES = ("mlx_vlm_prune", "convert", "torch_ref", "benchmarks")  # `python -m` starts commands of


def watch_start() -> None:
    """From here to `end_watch` Ctrl-C ends the process, if a command is being started: `python -m`
    imports a command's package before it knows its file, and calls itself "-m" until then."""
    if sys.argv[:1] == ["-m"]:
        is_command = _started_module().partition(".")[0] in PACKAGES
    else:
        is_command = os.path.basename("".join(sys.argv[:1])) in SCRIPTS
    is_usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_command and is_usual and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _end)


def _started_module() -> str:
    """What stands behind `-m`, alone or together with it."""
    words = iter(sys.orig_argv[1:])
    option = next((word for word in words if word.startswith("-m")), "-m")
    return option[2:] or next(words, "")


def end_watch() -> None:
    """Ctrl-C is Python's KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: Any) -> None:
    """Nothing was begun, so nothing is to be put back; a library that is being imported would take
    an exception for a fault of its own."""
    if sys.stderr and sys.stderr.isatty():
        os.write(2, b"\n")
    os._exit(130)
