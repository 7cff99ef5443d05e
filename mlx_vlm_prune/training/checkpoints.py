"""Checkpoints of a run: FOLDER/checkpoints/0000100 holds all that the next step depends on.

Written beside and renamed, so that whatever has the name is whole. The two newest are kept.
"""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.optimizers import Optimizer
from mlx.utils import tree_flatten, tree_unflatten

from ..checkpoints.errors import UserError
from ..checkpoints.reading.files import atomic_path, read_json, write_json
from ..models.arrays import read_arrays
from .config import TrainConfig

FOLDER, WEIGHTS, OPTIMIZER, STATE = "checkpoints", "weights", "optimizer", "state.json"
KEPT = 2
# Keys that may differ when a run goes on: they change no step that was taken.
FREE = {
    "iters", "epochs", "resume", "steps_per_report", "steps_per_eval", "val_batches", "save_every",
    "output", "adapter_path", "report_to", "project_name",
}  # fmt: skip


@dataclass(frozen=True)
class Progress:
    """How far a run is."""

    iteration: int = 0  # steps taken
    trained_tokens: int = 0  # of answers


def checkpoint_folders(run: Path) -> list[Path]:
    """Those of a run, the newest last."""
    return sorted(path for path in (run / FOLDER).glob("*") if path.name.isdecimal())


def save(
    run: Path, learner: nn.Module, optimizer: Optimizer, progress: Progress, config: TrainConfig
) -> Path:
    """Write a checkpoint; where one of that step is there, nothing. Raises UserError."""
    target = run / FOLDER / f"{progress.iteration:07d}"
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        with atomic_path(target, folder=True) as folder:
            weights: Any = tree_flatten(learner.trainable_parameters())
            state: Any = tree_flatten(optimizer.state)
            _write(folder / WEIGHTS, dict(weights))
            _write(folder / OPTIMIZER, dict(state))
            write_json(folder / STATE, {"progress": asdict(progress), "config": asdict(config)})
    for old in checkpoint_folders(run)[:-KEPT]:
        shutil.rmtree(old)
    return target


def _write(path: Path, arrays: dict[str, mx.array]) -> None:
    """As safetensors. Raises OSError where the disk is full."""
    try:
        mx.save_safetensors(str(path), arrays)
    except RuntimeError as e:
        raise OSError(None, str(e)) from None


def restore(
    folder: Path, learner: nn.Module, optimizer: Optimizer, config: TrainConfig
) -> Progress:
    """Take over weights and optimizer; where the run stands. Raises UserError where the checkpoint
    is of another run."""
    state = read_json(folder / STATE)
    before, now = state.get("config", {}), asdict(config)
    for key in now.keys() - FREE:
        value = list(now[key]) if isinstance(now[key], tuple) else now[key]
        if before.get(key) != value:
            raise UserError(
                f"{folder} was written with {key}={before.get(key)!r}; a run goes on with the same"
            )
    weights = read_arrays(folder / f"{WEIGHTS}.safetensors")
    expected: Any = tree_flatten(learner.trainable_parameters())
    if {k: v.shape for k, v in expected} != {k: v.shape for k, v in weights.items()}:
        raise UserError(f"{folder} holds other weights than this run trains")
    learner.load_weights(list(weights.items()), strict=False)
    pairs = list(read_arrays(folder / f"{OPTIMIZER}.safetensors").items())
    optimizer.state = tree_unflatten(pairs)
    mx.eval(learner.parameters(), optimizer.state)
    return Progress(**state["progress"])
