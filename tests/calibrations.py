"""Made-up calibrations, checked by hand, and a model to calibrate.

N = 16, the tower takes 100 ms, a pruner 1 ms, and the language model 1 ms a row. Every run takes
as long as the others, unless a test slows some down.
"""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlx_vlm_prune.generation.stream import prepare
from mlx_vlm_prune.planning import calibration
from mlx_vlm_prune.planning.calibration import Calibration, Run, calibrate
from mlx_vlm_prune.pruners import plan

from . import tiny

QUESTION = "Is there a red star?"
N, SHORT, LONG = 16, 8, 128
MB = 1_000_000


def run(K: int, text: int = SHORT, images: int = 1, by: float = 1.0, **more: float) -> Run:
    """A run that took `by` times as long as usual; `more` replaces a part's usual ms."""
    rows = text + images * K
    usual = {"vision": 100.0 * images, "pruner": float(K < N) * images, "prefill": float(rows)}
    ms = {part: by * value for part, value in {**usual, **more}.items()}
    nbytes = {"vision": 20 * MB * images, "pruner": 0, "prefill": rows * MB}
    return Run(K, text, images, ms, nbytes)


USUAL = (*(run(K) for K in (1, 8, 15, N)), run(4, LONG), run(N, LONG))


def of(*runs: Run, in_tower: bool = False, row_bytes: int = 1000) -> Calibration:
    return Calibration("norm", N, in_tower, row_bytes, runs or USUAL, {})


def slowed(by: float, which: set[int]) -> Calibration:
    """Eight rounds of the usual runs, of which some, by number, took longer."""
    rounds = [replace(r) for _ in range(8) for r in USUAL]
    return of(*(run(*r.setting, by=by if n in which else 1.0) for n, r in enumerate(rounds)))


def write_home(folder: Path) -> Path:
    """A folder with a small model, mlx, and a picture, a.png."""
    tiny.checkpoint(tiny.reference(), folder)
    pixels = np.random.default_rng(0).integers(0, 255, (80, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    return folder


def start_afresh(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Path:
    """An empty cache folder, nothing remembered by the process, two runs of each setting, none so
    slow that a calibration is not worth keeping, and no slack beyond the runs' own."""
    monkeypatch.setenv("MLX_VLM_PRUNE_CACHE", str(cache))
    monkeypatch.setattr(calibration, "_loaded", {})
    monkeypatch.setattr(calibration, "BUSY", math.inf)
    monkeypatch.setattr(calibration, "MANY", 2)
    monkeypatch.setattr(calibration, "STEADY", 1.0)
    return cache


def inputs_of(loaded, home, images: int = 1, prompt: str = QUESTION):
    return prepare(*loaded, prompt, [home / "a.png"] * images)


def remember(loaded, home, cache):
    """The file of a new calibration, which this process then forgets."""
    model, processor = loaded
    calibrate(model, processor.folder, plan("norm"), inputs_of(loaded, home))
    calibration._loaded.clear()
    (file,) = (cache / "calibrations").iterdir()
    return file
