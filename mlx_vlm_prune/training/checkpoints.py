"""Checkpoints of a run: FOLDER/checkpoints/0000100 holds all that the next step depends on.

Written beside and renamed, so that whatever has the name is whole. The two newest are kept.
"""

from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.optimizers import Optimizer
from mlx.utils import tree_flatten, tree_unflatten

from ..checkpoints.errors import UserError
from ..checkpoints.reading.files import atomic_path
from ..models.arrays import read_arrays
from .config import TrainConfig
from .learner import Learner
from .run_state import (
    FOLDER,
    OPTIMIZER,
    WEIGHTS,
    Progress,
    check_weights,
    read_state,
    remove_old,
    write_state,
)


def save(
    run: Path, learner: Learner, optimizer: Optimizer, progress: Progress, config: TrainConfig
) -> Path:
    """Write a checkpoint; where one of that step is there, nothing. Raises UserError."""
    target = run / FOLDER / f"{progress.iteration:07d}"
    if not target.exists():
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(f"cannot write {target}: {e.strerror or e}") from None
        with atomic_path(target, folder=True) as folder:
            state: Any = tree_flatten(optimizer.state)
            _write(folder / WEIGHTS, learner.saved_parameters())
            _write(folder / OPTIMIZER, dict(state))
            write_state(folder, progress, config)
    remove_old(run)
    return target


def _write(path: Path, arrays: dict[str, mx.array]) -> None:
    """As safetensors. Raises OSError where the disk is full."""
    try:
        mx.save_safetensors(str(path), arrays)
    except RuntimeError as e:
        raise OSError(None, str(e)) from None


def restore(folder: Path, learner: Learner, optimizer: Optimizer, config: TrainConfig) -> Progress:
    """Take over weights and optimizer; where the run stands. Raises UserError where the checkpoint
    is of another run."""
    progress = read_state(folder, config)
    weights = read_arrays(folder / WEIGHTS)
    check_weights(folder, learner.saved_parameters(), weights)
    learner.load_weights(list(weights.items()), strict=False)
    optimizer.state = tree_unflatten(list(read_arrays(folder / OPTIMIZER).items()))
    if not config.lr_schedule:  # which may be another than before
        optimizer.learning_rate = config.learning_rate
    mx.eval(learner.parameters(), optimizer.state)
    return progress
