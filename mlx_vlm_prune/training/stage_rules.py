"""What a stage trains, whichever framework trains it."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from ..checkpoints.command_line import either
from ..checkpoints.errors import UserError
from .config import TrainConfig

# The parts of a model that a stage trains, unless `freeze` names them. In `pretrain` the projector
# learns what a language model reads, EfficientVLM's and LLaVA's first stage; EfficientVLM's has
# `language_layers: 1` as well. `sft` is EfficientVLM's second stage.
PARTS = {
    "pretrain": ("projector", "pruner"),
    "sft": ("projector", "pruner", "language"),
    "pruner": ("pruner",),
}


def trains(config: TrainConfig, part: str) -> bool:
    """Does a part learn: by the stage or by `unfreeze`, and unless `freeze` names it?"""
    return part in (*PARTS.get(config.stage, ()), *config.unfreeze) and part not in config.freeze


def falling(iteration: int, iters: int) -> float:
    """From 1 in the first step to 0 after the last, by a half wave of the cosine."""
    return 0.5 + 0.5 * math.cos(math.pi * iteration / iters)


@dataclass(frozen=True)
class TrainableMethods:
    """A framework's methods whose weights a loss behind the pruner trains."""

    methods: Collection[str]
    is_trainable: Callable[[str], bool]
    presets: Mapping[str, str]

    @property
    def names(self) -> list[str]:
        """All of them at this moment."""
        return [name for name in self.methods if self.is_trainable(name)]

    def of_chain(self, spec: str) -> list[str]:
        """Those of a chain."""
        parts = self.presets.get(spec, spec).split("+")
        names = [part.partition(":")[0] for part in parts]
        return [name for name in names if name in self.methods and self.is_trainable(name)]

    def check(self, config: TrainConfig) -> None:
        """Raise UserError where a pruner shall learn that has nothing to learn."""
        if self.of_chain(config.pruner):
            return
        if "pruner" in config.unfreeze:
            raise UserError(f"unfreeze names pruner; pruner {config.pruner} has nothing to learn")
        if config.stage == "pruner":
            raise UserError(
                f"pruner {config.pruner} has nothing to learn; stage pruner trains"
                f" {either(self.names)}"
            )
