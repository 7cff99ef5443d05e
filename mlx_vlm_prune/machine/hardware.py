"""The machine and the versions that figures were measured with."""

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..checkpoints.version import __version__
from . import blas


def describe_machine() -> dict[str, Any]:
    """The processor's name, how many cores this process may use, the system, MLX's device."""
    return {
        "cpu": _cpu_name(),
        "cores": _core_count(),
        "system": f"{_system_name()} {platform.machine()}",
        "device": "cpu" if on_cpu() else "gpu",
    }


def on_cpu() -> bool:
    """Whether MLX computes on the CPU where nothing else is said."""
    return mx.default_device().type == mx.DeviceType.cpu


def on_cuda() -> bool:
    """Whether MLX computes on a GPU that is no Mac's."""
    return not on_cpu() and not mx.metal.is_available()


def environment(dtype: mx.Dtype) -> dict[str, Any]:
    """All that a model's times depend on beside the model; times of another one do not compare."""
    return {
        "machine": describe_machine(),
        "device": mx.device_info().get("device_name"),
        "versions": versions(),
        "dtype": str(dtype),
        "threads": os.environ.get("OMP_NUM_THREADS"),
    }


def _core_count() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _system_name() -> str:
    if platform.system() == "Darwin":
        return f"macOS {platform.mac_ver()[0]}"
    return platform.system()


def _cpu_name() -> str:
    """As the system calls it; the architecture where it has no name."""
    try:
        if platform.system() == "Darwin":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(
                command, capture_output=True, text=True, check=True
            ).stdout.strip()
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except (OSError, subprocess.SubprocessError):
        pass
    return platform.processor() or platform.machine()


def versions() -> dict[str, str | None]:
    """Of this package, Python, the packages below it, and the file name of the BLAS."""
    versions: dict[str, str | None] = {
        "mlx_vlm_prune": __version__,
        "python": sys.version.split()[0],
    }
    for package in ("mlx", "mlx-vlm", "numpy", "pillow", "tokenizers", "transformers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return versions | {"blas": blas.loaded()}
