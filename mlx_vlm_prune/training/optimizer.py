"""The optimizer that a config names, with its schedule."""

from collections.abc import Mapping
from typing import Any

from mlx import optimizers as optim

from ..checkpoints.errors import UserError, missing_package, reason
from .config import TrainConfig

CLASSES = {
    "adam": optim.Adam, "adamw": optim.AdamW, "muon": optim.Muon, "sgd": optim.SGD,
    "adafactor": optim.Adafactor,
}  # fmt: skip


def make_optimizer(config: TrainConfig) -> optim.Optimizer:
    """As the config names it. Raises UserError for settings that it does not take."""
    rate: Any = config.learning_rate
    if config.lr_schedule:
        rate = _schedule(config.lr_schedule)
    settings = dict(config.optimizer_config.get(config.optimizer, config.optimizer_config))
    if config.optimizer in ("adam", "adamw"):  # as published and as PyTorch's; not MLX's default
        settings.setdefault("bias_correction", True)
    try:
        optimizer: optim.Optimizer = CLASSES[config.optimizer](learning_rate=rate, **settings)
    except (TypeError, ValueError) as e:
        raise UserError(f"optimizer_config does not suit {config.optimizer}: {reason(e)}") from None
    return optimizer


def _schedule(settings: Mapping[str, Any]) -> Any:
    """mlx-lm's, with numbers that YAML read as texts. Raises UserError."""
    try:
        from mlx_lm.tuner.utils import build_schedule
    except ImportError:
        raise missing_package("mlx_lm", "lr_schedule") from None
    try:
        values = dict(settings)
        values["arguments"] = [float(x) if isinstance(x, str) else x for x in values["arguments"]]
        return build_schedule(values)
    except (KeyError, AttributeError, TypeError, IndexError, ValueError) as e:
        raise UserError(
            "lr_schedule must have mlx-lm's keys, name and arguments, and may have warmup and"
            f" warmup_init ({type(e).__name__}: {reason(e)})"
        ) from None
