"""Where a run stands, as its checkpoints say; the same in MLX and in the reference.

FOLDER/checkpoints/0000100 holds weights.safetensors, what learns under its name in a checkpoint
folder of ours behind `model.`; optimizer.safetensors, its state as MLX names it; and state.json.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..checkpoints.errors import UserError
from ..checkpoints.reading.files import read_json, write_json
from .config import TrainConfig

FOLDER, STATE = "checkpoints", "state.json"
WEIGHTS, OPTIMIZER = "weights.safetensors", "optimizer.safetensors"
KEPT = 2
# Keys that may differ when a run goes on: they change no step that was taken.
FREE = {
    "iters", "epochs", "resume", "steps_per_report", "steps_per_eval", "val_batches", "save_every",
    "output", "adapter_path", "report_to", "project_name", "skip_bad",
}  # fmt: skip


@dataclass(frozen=True)
class Progress:
    """How far a run is."""

    iteration: int = 0  # steps taken
    trained_tokens: int = 0  # of answers
    loss: float = 0.0  # summed since the last report
    loss_tokens: int = 0  # over so many tokens
    processes: int = 1  # that train together
    bad: Sequence[int] = ()  # examples that could not be used
    cut: Sequence[int] = ()  # and those that were too long


def checkpoint_folders(run: Path) -> list[Path]:
    """Those of a run, the newest last."""
    return sorted(path for path in (run / FOLDER).glob("*") if path.name.isdecimal())


def remove_old(run: Path) -> None:
    for old in checkpoint_folders(run)[:-KEPT]:
        shutil.rmtree(old)


def write_state(folder: Path, progress: Progress, config: TrainConfig) -> None:
    write_json(folder / STATE, {"progress": asdict(progress), "config": asdict(config)})


def read_state(folder: Path, config: TrainConfig) -> Progress:
    """Where the run of a checkpoint stands. Raises UserError where it is another run's."""
    state = read_json(folder / STATE)
    before, now = state.get("config", {}), asdict(config)
    for key in now.keys() - FREE:
        value = list(now[key]) if isinstance(now[key], tuple) else now[key]
        if before.get(key) != value:
            raise UserError(
                f"{folder} was written with {key}={before.get(key)!r}; a run goes on with the same,"
                f" not with {value!r}"
            )
    return Progress(**state["progress"])


def check_weights(folder: Path, expected: Mapping[str, Any], weights: Mapping[str, Any]) -> None:
    """UserError where a checkpoint's tensors are not those that a run trains, by name and shape."""
    shapes = [{name: tuple(array.shape) for name, array in x.items()} for x in (expected, weights)]
    if shapes[0] != shapes[1]:
        raise UserError(f"{folder} holds other weights than this run trains")
