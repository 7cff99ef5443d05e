"""A training run from its config: load, read, train, write."""

import logging
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..checkpoints.errors import UserError, missing_package
from ..hosts.loading import kind_of, load
from ..models.loading import find_folder
from . import summary
from .base_model import load_base_model
from .batches import Reader
from .config import TrainConfig
from .curve import draw_curve
from .display import Display
from .formats import Dataset, open_dataset, split_files
from .metrics import Metrics
from .processes import Processes
from .recompute import recompute_layers
from .run_folder import claimed
from .run_state import checkpoint_folders
from .stages import LEARNERS
from .trainer import Report, Trainer

logger = logging.getLogger("mlx_vlm_prune")


def train(config: TrainConfig) -> None:
    """Train as the config says. Raises UserError for what cannot be trained or read."""
    processes = Processes()
    with processes.mistakes_once(), ExitStack() as stack:
        with processes.together():
            if processes.is_first:
                stack.enter_context(claimed(config))
        _train(config, processes)


def _train(config: TrainConfig, processes: Processes) -> None:
    """With the folder claimed."""
    begin = time.perf_counter()
    with processes.together():
        trainer = make_trainer(config, processes)
    before = summary.fingerprints(trainer.learner)
    trainer.resume()
    metrics = send = None
    with processes.together():
        if processes.is_first:
            metrics = Metrics(config.folder, trainer.progress.iteration)
            send = reporter(config)
    evaluated = metrics.evaluated if metrics else set()
    trainer.evaluated = processes.union(evaluated, trainer.progress.iteration + 1)
    display = Display(config, trainer)

    def report(figures: Report) -> None:
        if metrics:
            metrics.append(dict(figures))
            display.report(figures)
        if send:
            send(dict(figures))

    trainer.on_report, trainer.on_step = report, display.step
    display.say(summary.opening(trainer))
    try:
        trainer.run()
    except KeyboardInterrupt:
        display.close()
        display.say([_stopped(trainer)])
        raise
    finally:
        display.close()
    if metrics:
        try:
            draw_curve(metrics, config.folder)
        except UserError as e:
            logger.info("%s", e)
        display.say(summary.closing(trainer, metrics, before, time.perf_counter() - begin))


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
    """Of a model of mlx-vlm's, in which adapters can learn. Raises UserError."""
    if config.stage not in ("lora", "dora") or config.grad_checkpoint:
        raise UserError(
            f"{config.model} is a model of mlx-vlm's, in which the stages lora and dora learn,"
            " without grad_checkpoint"
        )
    from .host_adapters import HostAdapters
    from .host_batches import HostReader

    learner: Any = HostAdapters(*load(config.model, dtype=config.dtype), config)
    readers: dict[str, Any] = {
        split: HostReader(
            dataset, learner.host.processor, learner.model.config, config.max_seq_length,
            config.skip_bad, config.chat_template_config, host=learner.host,
        )
        for split, dataset in datasets.items()
    }  # fmt: skip
    return Trainer(config, learner, readers["train"], readers.get("valid"), processes)


def reporter(config: TrainConfig) -> Callable[[dict[str, Any]], None] | None:
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


def _stopped(trainer: Trainer) -> str:
    """How to go on."""
    words = [word for word in sys.argv[1:] if word != "--resume"]
    command = shlex.join([*words, "--resume"]) if words else "--resume"
    folders = checkpoint_folders(trainer.config.folder)
    place = f"behind step {int(folders[-1].name)}" if folders else "before the first checkpoint"
    return f"stopped {place} of {trainer.iters}; the same command with --resume goes on: {command}"
