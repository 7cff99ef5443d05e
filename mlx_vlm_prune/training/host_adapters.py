"""Stages `lora` and `dora` in a model of mlx-vlm's: its own layers, in its own files."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..checkpoints.adapters import write_adapters
from ..hosts.adapters import adapter_config, add_adapters
from ..hosts.host import Host
from ..models.arrays import to_raw
from .config import TrainConfig
from .host_learner import HostLearner


class HostAdapters(HostLearner):
    """Adapters in the language model."""

    def __init__(self, host: Host, config: TrainConfig):
        super().__init__(host, config, {})
        mx.random.seed(config.seed)
        add_adapters(self.model, config.adapters)

    def save_adapters(self, folder: Path, iteration: int) -> None:
        """The files that mlx-vlm writes and reads."""
        settings = asdict(self.settings) | adapter_config(self.model)
        learned: Any = tree_flatten(self.model.trainable_parameters())
        tensors = {name: to_raw(array) for name, array in learned}
        write_adapters(folder, iteration, settings, tensors)
