"""Weights of the learned pruners in a chain: which there are, and untrained ones to begin with."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import mlx.core as mx

from ..checkpoints.config import ATTENTION_POOL
from ..checkpoints.errors import UserError
from ..inputs.budget import budget
from ..models.vlm import VLM
from ..pruners import METHODS, PRESETS, plan
from .config import TrainConfig, check_reset
from .stage_rules import TrainableMethods
from .trained_folder import TWIG

TRAINABLE = TrainableMethods(METHODS, lambda name: METHODS[name].learned and name != TWIG, PRESETS)


def trained_inside(model: VLM, name: str) -> bool:
    """Are a method's weights a part of the model?"""
    return "pruner" in model and model.learned.get(name) is model.pruner


def add_untrained(model: VLM, config: TrainConfig) -> list[str]:
    """Give the model weights, from the seed, of the chain's learned methods that it has none of,
    or of all with `reset_pruner`; their names.

    Raises UserError for a budget that no image has.
    """
    names, is_reset = TRAINABLE.of_chain(config.pruner), config.reset_pruner
    check_reset(config, names)
    missing = [name for name in names if is_reset or name not in model.learned]
    if not missing:
        return []
    mx.random.seed(config.seed)
    K = budget(model.N, config.keep_ratio, config.keep_tokens, plan("random"))
    if ATTENTION_POOL in missing and K == model.N:
        raise UserError(f"{ATTENTION_POOL} of all {K} visual tokens is never used; keep fewer")
    learned: Mapping[str, Any] = {
        name: METHODS[name].make_weights(model.feature_dims, K) for name in missing
    }
    pool = learned.get(ATTENTION_POOL)
    is_beside = ATTENTION_POOL in model.learned and not trained_inside(model, ATTENTION_POOL)
    if pool is not None and model.merge == (1, 1) and not is_beside:  # its place is in the model
        pool.set_dtype(model.dtype)
        model.pruner = pool
        model.config = replace(model.config, pruner=(ATTENTION_POOL, K))
    model.learned = MappingProxyType({**model.learned, **learned})
    return missing
