"""Made-up calibrations, checked by hand, and a model to calibrate.

N = 16. The tower takes 100 ms, a pruner 1 ms, and the language model 1 ms a row. All runs are
equally fast, unless a test slows some down.
"""

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlx_vlm_prune.generation.stream import prepare_prompt
from mlx_vlm_prune.planning import calibration
from mlx_vlm_prune.planning.calibration import LONG_TEXT, SHORT_TEXT, Calibration, calibrate
from mlx_vlm_prune.planning.prediction import Run
from mlx_vlm_prune.pruners import plan

from . import tiny

QUESTION = "Is there a red star?"
N, MB = 16, 1_000_000


def run(K: int, text: int = SHORT_TEXT, images: int = 1, slower: float = 1.0, **ms: float) -> Run:
    """A run that is `slower` times as slow as the others; `ms` replaces the ms of a part."""
    rows = text + images * K
    usual = {"vision": 100.0 * images, "pruner": float(K < N) * images, "prefill": float(rows)}
    ms = {part: slower * value for part, value in {**usual, **ms}.items()}
    nbytes = {"vision": 20 * MB * images, "pruner": 0, "prefill": rows * MB}
    return Run(K, text, images, ms, nbytes)


RUNS = (*(run(K) for K in (1, 8, 15, N)), run(4, LONG_TEXT), run(N, LONG_TEXT))


def of(*runs: Run, in_tower: bool = False, row_bytes: int = 1000) -> Calibration:
    return Calibration("norm", N, in_tower, row_bytes, runs or RUNS, {})


def slowed(slower: float, numbers: set[int]) -> Calibration:
    """Eight rounds of RUNS; those with these numbers are slower."""
    runs = enumerate([*RUNS] * 8)
    return of(*(run(*r.setting, slower=slower if n in numbers else 1.0) for n, r in runs))


def write_home(folder: Path) -> Path:
    """A folder with a small model, mlx, and a picture, a.png."""
    tiny.checkpoint(tiny.reference(), folder)
    pixels = np.random.default_rng(0).integers(0, 255, (80, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    return folder


def isolate(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Path:
    """An empty cache folder and an empty memory of the process; two runs of each setting; every
    calibration is saved; no slack beyond that of the runs."""
    monkeypatch.setenv("MLX_VLM_PRUNE_CACHE", str(cache))
    monkeypatch.setattr(calibration, "_loaded", {})
    monkeypatch.setattr(calibration, "BUSY_SLACK", math.inf)
    monkeypatch.setattr(calibration, "MOST_ROUNDS", 2)
    monkeypatch.setattr(calibration, "LEAST_SLACK", 1.0)
    return cache


def inputs_of(loaded, home, images: int = 1, prompt: str = QUESTION):
    return prepare_prompt(*loaded, prompt, [home / "a.png"] * images)


def save_calibration(loaded, home, cache):
    """The file of a new calibration, which is only there and not in this process's memory."""
    model, processor = loaded
    calibrate(model, processor.folder, plan("norm"), inputs_of(loaded, home))
    calibration._loaded.clear()
    (file,) = (cache / "calibrations").iterdir()
    return file
