"""A training run from its config: load, read, train, write."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..checkpoints.errors import UserError, missing_package
from ..hosts.families import host_of
from ..hosts.loading import kind_of, load
from ..models.loading import find_folder
from .base_model import load_base_model
from .batches import Reader
from .config import TrainConfig
from .formats import Dataset, open_dataset, split_files
from .processes import Processes
from .recompute import recompute_layers
from .session import Send, train_together
from .stages import LEARNERS
from .trainer import Trainer


def train(config: TrainConfig) -> None:
    """Train as the config says. Raises UserError for what cannot be trained or read."""
    processes = Processes()
    train_together(config, processes, lambda: make_trainer(config, processes), reporter)


def make_trainer(config: TrainConfig, processes: Processes) -> Trainer:
    """The model, its data and what learns. Raises UserError."""
    if config.stage not in LEARNERS:
        raise UserError(f"stage {config.stage} cannot be trained yet")
    images = Path(config.image_folder) if config.image_folder else None
    datasets = {
        split: open_dataset(path, config.format, images)
        for split, path in split_files(Path(config.data)).items()
    }
    if config.tower is None and kind_of(find_folder(config.model)):
        return _host_trainer(config, processes, datasets)
    model, processor = load_base_model(config)
    readers = {
        split: Reader(
            dataset, processor, model.config, config.max_seq_length, config.skip_bad,
            config.chat_template_config,
        )
        for split, dataset in datasets.items()
    }  # fmt: skip
    learner = LEARNERS[config.stage](model, config)
    if config.grad_checkpoint:
        recompute_layers(learner)
    return Trainer(config, learner, readers["train"], readers.get("valid"), processes)


def _host_trainer(
    config: TrainConfig, processes: Processes, datasets: Mapping[str, Dataset]
) -> Trainer:
    """Of a model of mlx-vlm's. Raises UserError."""
    from .host_adapters import HostAdapters
    from .host_batches import HostReader
    from .host_pruner import HostPruner

    learners: dict[str, Any] = {"lora": HostAdapters, "dora": HostAdapters, "pruner": HostPruner}
    if config.stage not in learners or config.grad_checkpoint:
        raise UserError(
            f"{config.model} is a model of mlx-vlm's, in which the stages {', '.join(learners)}"
            " learn, without grad_checkpoint"
        )
    host = host_of(*load(config.model, dtype=config.dtype))
    learner = learners[config.stage](host, config)
    readers: dict[str, Any] = {
        split: HostReader(
            dataset, learner.host.processor, learner.model.config, config.max_seq_length,
            config.skip_bad, config.chat_template_config, host=learner.host,
        )
        for split, dataset in datasets.items()
    }  # fmt: skip
    return Trainer(config, learner, readers["train"], readers.get("valid"), processes)


def reporter(config: TrainConfig) -> Send | None:
    """mlx-lm's callbacks, where `report_to` names some. Raises UserError where one is missing."""
    if not config.report_to:
        return None
    try:
        from mlx_lm.tuner.callbacks import get_reporting_callbacks
    except ImportError:
        raise missing_package("mlx_lm", "report_to") from None
    names = ",".join(config.report_to.replace(",", " ").split())
    project = config.project_name or "mlx_vlm_prune"
    try:
        callbacks = get_reporting_callbacks(names, project, str(config.folder), asdict(config))
    except ImportError:
        raise UserError(
            f"report_to is {config.report_to!r}, which is not installed: pip install {names}"
        ) from None

    def send(figures: dict[str, Any]) -> None:
        if "val_loss" in figures:
            callbacks.on_val_loss_report(figures)
        else:
            callbacks.on_train_loss_report(figures)

    return send
