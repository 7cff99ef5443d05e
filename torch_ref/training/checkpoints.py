"""Checkpoints of a run, in the files and under the names of MLX's.

Either framework goes on from what the other wrote, with its optimizer.
Adam's means are `NAME.m` and `NAME.v`, SGD's momentum is `NAME.v`.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlx_vlm_prune.checkpoints.reading.files import (
    atomic_path,
    open_safetensors,
    write_safetensors,
)
from mlx_vlm_prune.checkpoints.reading.tensors import RawTensor
from mlx_vlm_prune.training.config import TrainConfig
from mlx_vlm_prune.training.run_state import (
    FOLDER,
    OPTIMIZER,
    WEIGHTS,
    Progress,
    check_weights,
    read_state,
    remove_old,
    write_state,
)

from .learner import Learner

# From MLX's name to the name in the state of each of our optimizers.
ADAM, UNCORRECTED, SGD = (
    {"m": "exp_avg", "v": "exp_avg_sq"},
    {"m": "mean", "v": "square"},
    {"v": "momentum_buffer"},
)
NAMES = {"Adam": ADAM, "AdamW": ADAM, "UncorrectedAdam": UNCORRECTED, "SGD": SGD}


def save(learner: Learner, optimizer: Any, progress: Progress, config: TrainConfig) -> Path:
    """Write a checkpoint; where one of that step is there, nothing. Raises UserError."""
    target = config.folder / FOLDER / f"{progress.iteration:07d}"
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        with atomic_path(target, folder=True) as folder:
            write_safetensors(folder / WEIGHTS, learner.saved(), "mlx")
            state = _optimizer_tensors(learner, optimizer, progress)
            write_safetensors(folder / OPTIMIZER, state, "mlx")
            write_state(folder, progress, config)
    remove_old(config.folder)
    return target


def _optimizer_tensors(
    learner: Learner, optimizer: Any, progress: Progress
) -> dict[str, RawTensor]:
    rate = np.array(optimizer.param_groups[0]["lr"], np.float32)
    step = np.array(progress.iteration, np.uint64)
    tensors = {
        "learning_rate": RawTensor("F32", [], rate.reshape(-1).view(np.uint8)),
        "step": RawTensor("U64", [], step.reshape(-1).view(np.uint8)),
    }
    for theirs, ours in NAMES[type(optimizer).__name__].items():
        values = {
            name: optimizer.state[p][ours]
            for name, p in learner.parameters.items()
            if optimizer.state.get(p, {}).get(ours) is not None
        }
        tensors |= {f"{name}.{theirs}": t for name, t in learner.to_ours(values).items()}
    return tensors


@torch.no_grad()
def restore(folder: Path, learner: Learner, optimizer: Any, config: TrainConfig) -> Progress:
    """Take over weights and optimizer; where the run stands. Raises UserError where the checkpoint
    is of another run."""
    progress = read_state(folder, config)
    weights = open_safetensors(folder / WEIGHTS)
    check_weights(folder, learner.saved(), weights)
    for name, value in learner.to_reference(weights).items():
        {**learner.parameters, **learner.buffers}[name].copy_(value)
    held = open_safetensors(folder / OPTIMIZER)
    for theirs, ours in NAMES[type(optimizer).__name__].items():
        suffix = f".{theirs}"
        named = {k.removesuffix(suffix): t for k, t in held.items() if k.endswith(suffix)}
        for name, value in learner.to_reference(named).items():
            parameter = learner.parameters[name]
            state = optimizer.state[parameter]
            state[ours] = value.to(parameter)
            if ours.startswith("exp_"):
                state["step"] = torch.tensor(float(_count(held["step"])))
    return progress


def _count(tensor: RawTensor) -> int:
    return int(np.array(tensor.data).view(np.uint64)[0])
