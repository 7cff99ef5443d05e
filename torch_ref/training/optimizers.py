"""The optimizers and schedules of a config, by their formulas: steps equal those of MLX's.

Settings are MLX's: betas, eps, weight_decay, bias_correction, momentum, dampening, nesterov.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mlx_vlm_prune.checkpoints.command_line import either
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.training.config import TrainConfig

Schedule = Callable[[int], float]  # from the number of a step, from 0, to its learning rate


class UncorrectedAdam(torch.optim.Optimizer):
    """Adam without the correction of its first means, which bias_correction: false names.

    MLX's default for it; PyTorch has none. `weight_decay` is AdamW's.
    """

    def __init__(
        self, params: Any, lr: float, betas: Sequence[float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):  # fmt: skip
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no loss
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["mean"], state["square"] = torch.zeros_like(p), torch.zeros_like(p)
                state["mean"].lerp_(p.grad, 1 - b1)
                state["square"].lerp_(p.grad.square(), 1 - b2)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * state["mean"] / (state["square"].sqrt() + group["eps"]))


def make_optimizer(config: TrainConfig, parameters: Sequence[nn.Parameter]) -> Any:
    """As the config names it. Raises UserError for one that is not here, or for settings."""
    settings = dict(config.optimizer_config.get(config.optimizer, config.optimizer_config))
    corrected = settings.pop("bias_correction", True)
    classes: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "adam": torch.optim.Adam if corrected else UncorrectedAdam,
        "adamw": torch.optim.AdamW if corrected else UncorrectedAdam,
        "sgd": torch.optim.SGD,
    }
    if config.optimizer not in classes:
        raise UserError(
            f"optimizer {config.optimizer} is MLX's alone; torch_ref has {either(classes)}"
        )
    if config.optimizer == "adamw":
        settings.setdefault("weight_decay", 0.01)
    try:
        return classes[config.optimizer](parameters, lr=config.learning_rate, **settings)
    except (TypeError, ValueError) as e:
        raise UserError(f"optimizer_config does not suit {config.optimizer}: {e}") from None


def make_schedule(config: TrainConfig) -> Schedule:
    """The learning rate of every step, as mlx-lm builds it of lr_schedule."""
    if not config.lr_schedule:
        return lambda step: config.learning_rate
    try:
        values = dict(config.lr_schedule)
        values["arguments"] = [float(x) if isinstance(x, str) else x for x in values["arguments"]]
        return _schedule(values)
    except (KeyError, TypeError, IndexError, ValueError) as e:
        raise UserError(
            "lr_schedule must have mlx-lm's keys, name and arguments, and may have warmup and"
            f" warmup_init ({type(e).__name__}: {e})"
        ) from None


def _schedule(settings: Mapping[str, Any]) -> Schedule:
    arguments = settings["arguments"]
    schedule = SCHEDULES[settings["name"]](*arguments)
    warmup = settings.get("warmup", 0)
    if not warmup:
        return schedule
    rise = linear_schedule(settings.get("warmup_init", 0.0), arguments[0], warmup)
    return lambda step: rise(step) if step < warmup + 1 else schedule(step - warmup - 1)


def cosine_decay(init: float, decay_steps: int, end: float = 0.0) -> Schedule:
    def rate(step: int) -> float:
        share = 0.5 * (1 + math.cos(math.pi * min(step, decay_steps) / decay_steps))
        return end + share * (init - end)

    return rate


def linear_schedule(init: float, end: float, steps: int) -> Schedule:
    return lambda step: init + min(step, steps) * (end - init) / steps


def exponential_decay(init: float, decay_rate: float) -> Schedule:
    return lambda step: init * decay_rate**step


def step_decay(init: float, decay_rate: float, step_size: int) -> Schedule:
    return lambda step: init * decay_rate ** (step // step_size)


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    f.__name__: f for f in (cosine_decay, linear_schedule, exponential_decay, step_decay)
}


def clip(gradients: Sequence[Tensor], longest: float) -> float:
    """Shorten all together to a length, in place; how long they were."""
    norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
    share = (longest / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(share)
    return float(norm)
