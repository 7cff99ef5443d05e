"""Does a model fit? Said before anything is read: a machine that swaps answers nobody."""

import os
from pathlib import Path

from ..checkpoints.errors import UserError

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


def available() -> int | None:
    """Bytes that can be had: on Linux those free now, elsewhere all the machine has; None where
    nothing tells."""
    found = [n for n in (_free(), _group()) if n is not None]
    if found:
        return min(found)
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def check_fits(needed: int, what: str) -> None:
    """UserError where `needed` bytes of weights are more than can be had."""
    there = available()
    if there is not None and needed > there:
        raise UserError(
            f"{what} needs {needed / 1e9:.1f} GB for its weights, and {there / 1e9:.1f} GB are"
            " available; load it in float16, or convert it in 4 bits (to-mlx -q)"
        )


def _free() -> int | None:
    try:
        lines = MEMINFO.read_text().splitlines()
    except OSError:
        return None
    told = dict(line.split(":", 1) for line in lines if ":" in line)
    value = told.get("MemAvailable", "").split()
    return int(value[0]) * 1024 if value else None


def _group() -> int | None:
    """What a container leaves."""
    try:
        most, used = ((CGROUP / f"memory.{x}").read_text().strip() for x in ("max", "current"))
    except OSError:
        return None
    return max(0, int(most) - int(used)) if most.isdigit() else None
