"""What a run begins with: a model, or a language model and a tower with an untrained projector."""

import logging
from pathlib import Path

import mlx.core as mx

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.errors import UserError
from ..checkpoints.families import read_checkpoint
from ..checkpoints.hub import resolve_path
from ..inputs.processor import Processor
from ..models.loading import find_folder, load_checkpoint, load_folder
from ..models.vlm import VLM
from .config import TrainConfig

logger = logging.getLogger("mlx_vlm_prune")


def load_base_model(config: TrainConfig) -> tuple[VLM, Processor]:
    """The model and its processor. Raises UserError.

    With dtype `auto` a model in float16, whose range is too small for gradients, is trained in
    float32; adapters learn beside one in float16 as in mlx-lm.
    """
    name = config.model or "scenes"
    if config.tower is None:
        model, processor = load_folder(find_folder(config.model), name, config.dtype)
    else:
        start = read_start(config)
        model, processor = load_checkpoint(start, _path(config), name, config.dtype)
    is_whole = config.stage not in ("lora", "dora")
    if is_whole and config.dtype == "auto" and model.dtype == mx.float16:
        logger.info("%s is in float16, and is trained in float32", name)
        model.set_dtype(mx.float32)
    return model, processor


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
