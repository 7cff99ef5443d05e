"""A real BLAS for MLX on Linux CPU, loaded before MLX is.

The mlx-cpu wheel brings netlib's reference BLAS. Libraries loaded with RTLD_GLOBAL come before it
when MLX's symbols are bound, so one `dlopen` before the first import of MLX replaces it; afterwards
it is too late. float32 products gain 4 to 30 times (docs/log.md); float16, bfloat16 and quantised
ones never reach a BLAS there.

MLX_VLM_PRUNE_BLAS chooses: `auto` (the default), `off`, or the path of a library. `auto` acts only
where the wheel's reference BLAS lies, and takes the first of:

1. torch's own, where torch is installed, without importing torch. It comes first although it costs
   0.1 s and 60 MB: any other BLAS in front would also replace the one inside a torch that is
   imported later, whose attention then took up to 40 times as long.
2. MKL, then OpenBLAS, of the Python environment or the system.

Waiting OpenMP threads are told to sleep (OMP_WAIT_POLICY=passive, unless the user set it): spinning
ones take the cores from MLX's own threads, and made its attention slower than the reference BLAS.
"""

import ctypes
import functools
import importlib.util
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..checkpoints.errors import UserError

SWITCH = "MLX_VLM_PRUNE_BLAS"
TF32 = "MLX_ENABLE_TF32"  # mlx's own, which it reads once
SYMBOL = "sgemm_"  # what every BLAS has, and what the wheel's cblas_sgemm ends in
# Sonames rather than ctypes.util.find_library, which runs ldconfig and a compiler to find them.
SYSTEM = ("libmkl_rt.so", "libopenblas.so.0", "libopenblas.so")
LATE = (
    "mlx was imported before mlx_vlm_prune and goes on with the BLAS that it came with, up to 30"
    " times slower; import mlx_vlm_prune first"
)
LATE_TF32 = (
    "mlx was imported before mlx_vlm_prune and may multiply in TF32, which changes what tokens are"
    f" kept; import mlx_vlm_prune first, or set {TF32}=0"
)


@dataclass(frozen=True)
class Outcome:
    """What loading came to. The library is a file name: it is written into shared result files."""

    library: str | None
    reason: str
    refused: str | None = None  # the sentence for a user whose path does not load
    late: bool = False


_outcome: Outcome | None = None
_may_use_tf32 = False  # was mlx imported before it was switched off?


def load() -> str | None:
    """Load a BLAS, once; the file name of what was loaded, or None.

    Never raises for `auto`. Raises UserError, each time it is called, where MLX_VLM_PRUNE_BLAS
    names a library that does not load or is no BLAS. Warns, once, where it is too late for one.
    """
    prepare()
    assert _outcome is not None
    if _outcome.refused:
        raise UserError(_outcome.refused)
    if _outcome.late:
        _warn(LATE)
    if _may_use_tf32 and "gpu" in str(sys.modules["mlx.core"].default_device()):
        _warn(LATE_TF32)
    return _outcome.library


def prepare() -> None:
    """`load` for the top of a module: importing never fails, the next `load` says what is wrong."""
    global _outcome
    if _outcome is None:
        _disable_tf32()
        _outcome = _choose(os.environ.get(SWITCH) or "auto")


def _disable_tf32() -> None:
    """Have MLX multiply float32 in float32, whatever the user's environment says: TF32, which it
    else takes on a GPU, gets similarities wrong in the third digit."""
    global _may_use_tf32
    _may_use_tf32 = "mlx.core" in sys.modules and os.environ.get(TF32) != "0"
    os.environ[TF32] = "0"


@functools.cache
def _warn(sentence: str) -> None:
    logging.getLogger("mlx_vlm_prune").warning(sentence)


def loaded() -> str | None:
    """The file name of the BLAS that was loaded, or None. Loads nothing."""
    return _outcome.library if _outcome else None


def reason() -> str:
    """Why there is this BLAS or none, in a few words."""
    return _outcome.reason if _outcome else "not asked for yet"


def _choose(wanted: str) -> Outcome:
    if sys.platform != "linux":
        return Outcome(None, "not needed on this system")
    if wanted == "off":
        return Outcome(None, f"{SWITCH} is off")
    if wanted == "auto" and not _wheel_has_reference_blas():
        return Outcome(None, "not needed: this mlx brings no reference BLAS")
    if "mlx.core" in sys.modules:
        return Outcome(None, "too late: mlx was imported first", late=True)
    if wanted != "auto":
        return _explicit(wanted)
    for library in _candidates():
        with suppress(OSError):
            if _open(library):
                return Outcome(Path(library).name, "found")
    return Outcome(None, "no other BLAS found")


def _explicit(path: str) -> Outcome:
    allowed = "give auto, off, or the path of a BLAS library"
    try:
        if _open(path):
            return Outcome(Path(path).name, f"{SWITCH} names it")
    except OSError as e:
        refused = f"{SWITCH} is {path!r}, which does not load ({e}); {allowed}"
    else:
        refused = f"{SWITCH} is {path!r}, which has no {SYMBOL}; {allowed}"
    return Outcome(None, "refused", refused)


def _open(library: str) -> bool:
    """Load it for everyone to see, and say whether it, or what it depends on, is a BLAS."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # OpenMP reads it once, when it starts
    return hasattr(ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL), SYMBOL)


def _wheel_has_reference_blas() -> bool:
    return any(
        next(folder.parent.glob("mlx_cpu.libs/libblas*"), None) for folder in _folders("mlx")
    )


def _candidates() -> Iterator[str]:
    """Paths and sonames, best first; those that are not there fail to load."""
    for folder in _folders("torch"):
        yield str(folder / "lib" / "libtorch_cpu.so")
    environment = Path(sys.prefix) / "lib"
    for name in ("libmkl_rt.so*", "libopenblas.so*"):
        yield from map(str, sorted(environment.glob(name)))
    yield from SYSTEM


def _folders(package: str) -> list[Path]:
    """Where a package lies, without importing it; empty where it is not installed."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):  # a half-initialised module in sys.modules
        return []
    return [Path(place) for place in (spec and spec.submodule_search_locations) or ()]
