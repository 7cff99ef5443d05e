"""Runs a test's code in a process with limits of time and memory, many cases in one."""

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def run_limited(code: str, *arguments: Any, seconds: int = 60, gigabytes: int = 4) -> str:
    """What a program prints; it fails where the program does, or goes beyond its limits."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        if sys.platform == "linux":  # elsewhere this is not the memory in use
            resource.setrlimit(resource.RLIMIT_AS, (gigabytes << 30, gigabytes << 30))

    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, env=environment,
        capture_output=True, text=True, preexec_fn=limit, timeout=10 * seconds,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-3000:]}"
    return done.stdout
