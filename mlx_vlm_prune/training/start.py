"""What a run begins with: a model, or a language model and a tower with an untrained projector."""

from pathlib import Path

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.errors import UserError
from ..checkpoints.families import read_checkpoint
from ..checkpoints.hub import resolve_path
from ..inputs.processor import Processor
from ..models.loading import find_folder, load_checkpoint, load_folder
from ..models.vlm import VLM
from .config import TrainConfig


def load_start(config: TrainConfig) -> tuple[VLM, Processor]:
    """The model and its processor. Raises UserError."""
    name = config.model or "scenes"
    if config.tower is None:
        return load_folder(find_folder(config.model), name, config.dtype)
    return load_checkpoint(read_start(config), _path(config), name, config.dtype)


def read_start(config: TrainConfig) -> Checkpoint:
    """Its checkpoint; the tensors stay on the disk. Raises UserError."""
    if config.tower is None:
        return read_checkpoint(find_folder(config.model))
    path = _path(config)
    tokenizer = config.tokenizer and resolve_path(config.tokenizer)
    tower = resolve_path(config.tower)
    return read_checkpoint(path, tower, tokenizer or None, projector_seed=config.seed)


def _path(config: TrainConfig) -> Path:
    if config.model is None:
        raise UserError("tower goes with a language model's weights; name them by model")
    return resolve_path(config.model)
