"""Stages `lora` and `dora`: adapters in the language model learn; the model itself stays."""

from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..checkpoints.adapters import write_adapters
from ..models.adapters import add_adapters
from ..models.arrays import to_raw
from .learner import Learner


class Adapters(Learner):
    """Adapters by mlx-lm's layers, and the projector where `unfreeze` names it."""

    def unfreeze_parts(self) -> None:
        """Add the adapters; their first values follow from the seed."""
        mx.random.seed(self.settings.seed)
        add_adapters(self.model, self.settings.adapters)
        if self.trains("projector"):
            self.model.projector.unfreeze()

    def save_model(self, folder: Path) -> None:
        """The adapters lie there already; `fuse` writes a model with them."""

    def save_adapters(self, folder: Path, iteration: int) -> None:
        """The files that mlx-lm writes."""
        learned: Any = tree_flatten(self.model.trainable_parameters())
        tensors = {name: to_raw(array) for name, array in learned}
        write_adapters(folder, iteration, self.settings.adapter_settings, tensors)
