"""What the device that MLX uses can do at most: matrix rate, bandwidth, and which model fits."""

import re
from typing import Any

import mlx.core as mx

from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.machine.hardware import describe_machine
from mlx_vlm_prune.models.loading import DTYPES
from mlx_vlm_prune.models.memory import available_bytes

from .model_shapes import LAYERS, parameter_counts, shape
from .selectors import time_calls

SMALLEST = "llava-7b-2"  # of LLaVA-1.5-7B's cuts
ROOM = 1.25  # times the weights' bytes, for a model to fit


def is_gpu() -> bool:
    return describe_machine()["device"] == "gpu"


def memory_bytes() -> int | None:
    """Memory for a model: what the system recommends for a Mac's GPU, all of another GPU."""
    info = mx.device_info() if is_gpu() else {}
    for name in ("max_recommended_working_set_size", "total_memory", "memory_size"):
        if name in info:
            return int(info[name])
    return available_bytes()


def largest_that_fits(dtype: str, memory: int | None) -> str:
    """LLaVA-1.5-7B, or the cut of it with the most layers that leave room in memory."""
    fitting = (name for name in LAYERS if memory is None or needed_bytes(name, dtype) <= memory)
    return next(fitting, SMALLEST)


def needed_bytes(name: str, dtype: str) -> float:
    """Memory for a shape's weights and for what is computed with them."""
    return ROOM * DTYPES[dtype].size * sum(parameter_counts(shape(name)).values())


def check_fits(name: str, dtype: str) -> None:
    """UserError where a shape needs more memory than the device has."""
    needed, memory = needed_bytes(name, dtype), memory_bytes()
    if memory is not None and needed > memory:
        raise UserError(
            f"--shape {name} needs {needed / 1e9:.0f} GB, and there are {memory / 1e9:.0f} for a"
            f" model; of LLaVA-1.5-7B {largest_that_fits(dtype, memory)} fits"
        )


def ceilings(dtype: str) -> dict[str, Any]:
    """Matrix products in 1e12 operations a second, multiply and add being two; memory read in GB/s,
    by products of a matrix and a vector or by an addition, whichever is faster."""
    side, times = (4096, 8) if is_gpu() else (1024, 4)
    rates = {}
    for name in sorted({dtype, "float32"}):
        a = mx.random.normal((side, side)).astype(DTYPES[name])
        mx.eval(a)
        ms = time_calls(lambda a=a: [a @ a for _ in range(times)], 5)["median"]
        rates[name] = rounded(2 * times * side**3 / ms / 1e9)
    rows = 16384 if is_gpu() else 4096
    weight = mx.random.normal((rows, 8192)).astype(DTYPES[dtype])
    vectors = [mx.ones(8192, weight.dtype) + i for i in range(times)]
    mx.eval(weight, vectors)
    ways = {1: lambda: [weight @ vector for vector in vectors],
            2: lambda: [weight + i for i in range(times)]}  # fmt: skip
    gb_per_s = max(
        passes * times * weight.nbytes / time_calls(call, 5)["median"] / 1e6
        for passes, call in ways.items()
    )
    return {"tflops": rates, "gb_per_s": rounded(gb_per_s)}


def rounded(value: Any) -> Any:
    """Numbers, in objects too, with four digits."""
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def default_name() -> str:
    """The device's name in lower case, its words joined by hyphens."""
    machine = describe_machine()
    gpu = mx.device_info().get("device_name") if is_gpu() else None
    words = re.findall(r"[a-z0-9]+", re.sub(r"\(\w+\)", " ", str(gpu or machine["cpu"]).lower()))
    return "-".join([*words, *([] if gpu else [machine["device"]])])
