"""Where a run stands, as its checkpoints say; the same in MLX and in the reference.

FOLDER/checkpoints/0000100 holds weights.safetensors, what learns under its name in a checkpoint
folder of ours behind `model.`; optimizer.safetensors, its state as MLX names it; and state.json.
"""

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from os.path import abspath
from pathlib import Path
from typing import Any

from ..checkpoints.errors import UserError
from ..checkpoints.reading.files import read_json, write_json
from ..checkpoints.user_module import file_digests, with_files
from .config import TrainConfig

logger = logging.getLogger("mlx_vlm_prune")
FOLDER, STATE = "checkpoints", "state.json"
WEIGHTS, OPTIMIZER = "weights.safetensors", "optimizer.safetensors"
KEPT = 2
# Keys that may differ when a run goes on: they change no step that was taken.
MAY_DIFFER = {
    "iters", "epochs", "resume", "steps_per_report", "steps_per_eval", "val_batches", "save_every",
    "output", "adapter_path", "report_to", "project_name", "skip_bad", "learning_rate",
    "lr_schedule",
}  # fmt: skip
PATHS = {"data", "model", "tower", "tokenizer", "image_folder"}


@dataclass(frozen=True)
class Progress:
    """How far a run is."""

    iteration: int = 0  # steps taken
    trained_tokens: int = 0  # of answers
    loss: float = 0.0  # of answers, summed since the last report
    side_loss: float = 0.0  # and what else a learned method lowers
    loss_tokens: int = 0  # over so many tokens
    processes: int = 1  # that train together
    examples: int = 0  # of the data; 0 in a checkpoint that does not say it
    bad: Sequence[int] = ()  # examples that could not be used
    cut: Sequence[int] = ()  # and those that were too long


def checkpoint_folders(run: Path) -> list[Path]:
    """Those of a run, the newest last."""
    return sorted(path for path in (run / FOLDER).glob("*") if path.name.isdecimal())


def remove_old(run: Path) -> None:
    """Remove all but the newest; a run killed meanwhile leaves no part of one under its name."""
    for old in checkpoint_folders(run)[:-KEPT]:
        leaving = old.with_name(f".{old.name}.part-{os.getpid()}")
        old.rename(leaving)
        shutil.rmtree(leaving)


def write_state(folder: Path, progress: Progress, config: TrainConfig) -> None:
    state = {"progress": asdict(progress), "config": asdict(config)}
    if files := file_digests(config.pruner):
        state["files"] = files
    write_json(folder / STATE, state)


def read_state(folder: Path, config: TrainConfig) -> Progress:
    """Where the run of a checkpoint stands. Raises UserError where it is another run's."""
    state = read_json(folder / STATE)
    # A key that came later was at its default.
    defaults = {f.name: f.default for f in fields(config)}
    before, now = {**defaults, **state.get("config", {})}, asdict(config)
    for key in now.keys() - MAY_DIFFER:
        value = list(now[key]) if isinstance(now[key], tuple) else now[key]
        earlier = before.get(key)
        is_path = key in PATHS and value and earlier
        if abspath(str(earlier)) != abspath(str(value)) if is_path else earlier != value:
            raise UserError(
                f"{folder} was written with {key}={earlier!r}; a run goes on with the same,"
                f" not with {value!r}"
            )
    if state.get("files", {}) != file_digests(config.pruner):
        raise UserError(
            f"{folder} was written with another version of {with_files(config.pruner)}; a run goes"
            " on with the same"
        )
    for key in ("learning_rate", "lr_schedule"):
        if before.get(key) != now[key]:
            logger.info("%s was %s, and is %s from here on", key, before.get(key), now[key])
    return Progress(**state["progress"])


def check_weights(folder: Path, expected: Mapping[str, Any], weights: Mapping[str, Any]) -> None:
    """UserError where a checkpoint's tensors are not those that a run trains, by name and shape."""
    shapes = [{name: tuple(array.shape) for name, array in x.items()} for x in (expected, weights)]
    if shapes[0] != shapes[1]:
        raise UserError(f"{folder} holds other weights than this run trains")
