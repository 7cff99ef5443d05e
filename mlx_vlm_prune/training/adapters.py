"""Stages `lora` and `dora`: adapters in the language model learn; the model itself stays."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

from ..checkpoints.errors import UserError
from ..checkpoints.reading.files import atomic_path, write_json, write_safetensors
from ..models.adapters import CONFIG, WEIGHTS, AdapterConfig, add_adapters
from ..models.arrays import to_raw
from .learner import Learner


class Adapters(Learner):
    """Adapters by mlx-lm's layers, and the projector where `unfreeze` names it."""

    def unfreeze_parts(self) -> None:
        """Add the adapters; their first values follow from the seed."""
        c = self.settings
        self.adapter_config = AdapterConfig.of(c.stage, c.num_layers, c.lora_parameters)
        if "language" in c.freeze:
            raise UserError(f"freeze names language, in which adapters learn in stage {c.stage}")
        if others := set(c.unfreeze) - {"projector"}:
            raise UserError(
                f"unfreeze names {min(others)}; beside adapters only the projector can learn"
            )
        mx.random.seed(c.seed)
        add_adapters(self.model, self.adapter_config)
        if self.trains("projector"):
            self.model.projector.unfreeze()

    def finish(self, folder: Path) -> None:
        """The adapters lie there already; `fuse` writes a model with them."""

    def write(self, folder: Path, iteration: int) -> None:
        """The files that mlx-lm writes."""
        settings = {**asdict(self.settings), "fine_tune_type": self.settings.stage}
        settings["lora_parameters"] = self.adapter_config.lora_parameters
        write_adapters(self.model, settings, folder, iteration)


def write_adapters(
    model: nn.Module, settings: Mapping[str, Any], folder: Path, iteration: int
) -> None:
    """What learned in a model, and the settings it needs, each file whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    learned: Any = tree_flatten(model.trainable_parameters())
    arrays = {name: to_raw(array) for name, array in learned}
    with atomic_path(folder / CONFIG, replace=True) as path:
        write_json(path, settings)
    for name in (f"{iteration:07d}_{WEIGHTS}", WEIGHTS):
        with atomic_path(folder / name, replace=True) as path:
            write_safetensors(path, arrays, "mlx")
