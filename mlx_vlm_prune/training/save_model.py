"""What a run leaves for a user to load: a folder of ours, as `convert to-mlx` writes it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..checkpoints.checkpoint import Checkpoint
from ..models.arrays import to_raw
from ..models.language.experts import unstacked
from ..models.vlm import VLM
from .base_model import read_start
from .config import TrainConfig
from .trained_folder import with_trained, write_trained


def save_model(
    model: VLM, learned: Mapping[str, Mapping[str, mx.array]], config: TrainConfig, folder: Path
) -> None:
    """Write the model with the learned pruners' weights `learned` (by method and parameter) to
    FOLDER.

    A tensor that did not learn keeps its bytes. One that did is in the dtype which it has in the
    checkpoint that the run began with, whatever it was trained in; with `dtype` other than auto all
    are in that one. Weights that the checkpoint has not are in the language model's dtype, a small
    network's beside the model in float32.

    The model appears whole or not at all. Raises UserError where it cannot be written; what was
    there then stays.
    """
    write_trained(trained_checkpoint(read_start(config), model, learned), config, folder)


def trained_checkpoint(
    start: Checkpoint, model: VLM, learned: Mapping[str, Mapping[str, mx.array]]
) -> Checkpoint:
    """The checkpoint that a run began with, and what learned in place of what it was."""
    trainable: Any = tree_flatten(model.trainable_parameters())
    moved = {name: to_raw(array) for name, array in unstacked(dict(trainable)).items()}
    beside = {
        method: {name: to_raw(array) for name, array in weights.items()}
        for method, weights in learned.items()
    }
    pool = model.config.pruner[1] if model.config.pruner else None
    return with_trained(start, moved, beside, pool)
