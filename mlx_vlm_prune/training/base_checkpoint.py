"""The checkpoint that a run begins with, whichever framework trains it."""

from pathlib import Path

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.errors import UserError
from ..checkpoints.families import read_checkpoint
from ..checkpoints.hub import resolve_path
from ..scenes import CHECKPOINT
from .config import TrainConfig


def base_path(config: TrainConfig) -> Path:
    """Where the model, or with `tower` the language model, lies. Raises UserError."""
    if config.tower and config.model is None:
        raise UserError("tower goes with a language model's weights; name them by model")
    return resolve_path(config.model) if config.model else CHECKPOINT


def read_base(config: TrainConfig) -> Checkpoint:
    """A model, or a language model and a tower with a projector of values from the seed.

    The tensors stay on the disk. Raises UserError.
    """
    path = base_path(config)
    if config.tower is None:
        return read_checkpoint(path)
    tokenizer = resolve_path(config.tokenizer) if config.tokenizer else None
    return read_checkpoint(path, resolve_path(config.tower), tokenizer, projector_seed=config.seed)
