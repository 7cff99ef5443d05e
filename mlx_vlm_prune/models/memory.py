"""Whether a model's weights fit into memory, checked before they are read."""

import os
from pathlib import Path

from ..checkpoints.errors import UserError

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")
SMALLER = "load it in float16, or convert it in 4 bits (to-mlx -q)"


def available_bytes() -> int | None:
    """Memory for weights: on Linux what is free now, elsewhere all the machine has; None where
    the system does not tell."""
    limits = [n for n in (_free_bytes(), _container_bytes()) if n is not None]
    if limits:
        return min(limits)
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def check_fits(needed: int, model: str, advice: str = SMALLER) -> None:
    """UserError, with `advice`, where `needed` bytes of weights are more than are available."""
    available = available_bytes()
    if available is not None and needed > available:
        raise UserError(
            f"{model} needs {needed / 1e9:.1f} GB for its weights, and {available / 1e9:.1f} GB are"
            f" available; {advice}"
        )


def _free_bytes() -> int | None:
    try:
        lines = MEMINFO.read_text().splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    value = fields.get("MemAvailable", "").split()
    return int(value[0]) * 1024 if value else None


def _container_bytes() -> int | None:
    """What a container's limit leaves."""
    try:
        limit, used = ((CGROUP / f"memory.{x}").read_text().strip() for x in ("max", "current"))
    except OSError:
        return None
    return max(0, int(limit) - int(used)) if limit.isdigit() else None
