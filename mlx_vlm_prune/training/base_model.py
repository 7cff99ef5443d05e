"""What a run begins with: a model, or a language model and a tower with an untrained projector."""

import logging

import mlx.core as mx

from ..inputs.processor import Processor
from ..models.loading import find_folder, load_checkpoint, load_folder
from ..models.vlm import VLM
from .base_checkpoint import base_path, read_base
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
        base = read_base(config)
        model, processor = load_checkpoint(base, base_path(config), name, config.dtype)
    is_whole = config.stage not in ("lora", "dora")
    if is_whole and config.dtype == "auto" and model.dtype == mx.float16:
        logger.info("%s is in float16, and is trained in float32", name)
        model.set_dtype(mx.float32)
    return model, processor
