"""A training run from its config: load, read, train, write."""

from contextlib import ExitStack
from pathlib import Path

import torch

from mlx_vlm_prune.checkpoints.checkpoint import Checkpoint
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.checkpoints.families import read_checkpoint
from mlx_vlm_prune.checkpoints.hub import resolve_path
from mlx_vlm_prune.inputs.processor import read_processor
from mlx_vlm_prune.scenes import CHECKPOINT
from mlx_vlm_prune.training.batches import Reader
from mlx_vlm_prune.training.config import TrainConfig
from mlx_vlm_prune.training.curve import draw_curve
from mlx_vlm_prune.training.display import Display, first_weights
from mlx_vlm_prune.training.formats import open_dataset, split_files
from mlx_vlm_prune.training.metrics import Metrics
from mlx_vlm_prune.training.run_folder import claimed
from mlx_vlm_prune.training.run_loop import Report

from ..models.learned import read_learned
from ..models.loading import best_device, load_checkpoint
from .processes import Processes, own_device
from .recompute import recompute_layers
from .stages import LEARNERS
from .trainer import Trainer


def train(config: TrainConfig) -> None:
    """Train as the config says, in float32. Raises UserError for what cannot be trained or read."""
    processes = Processes(own_device(best_device()))
    with processes.mistakes_once(), ExitStack() as stack:
        with processes.together():
            if processes.is_first:
                stack.enter_context(claimed(config))
        with processes.together():
            trainer = make_trainer(config, processes)
        trainer.resume()
        metrics = None
        with processes.together():
            if processes.is_first:
                metrics = Metrics(config.folder, trainer.progress.iteration)
        evaluated = metrics.evaluated if metrics else set()
        trainer.evaluated = processes.union(evaluated, trainer.progress.iteration + 1)
        _run(trainer, metrics)


def _run(trainer: Trainer, metrics: Metrics | None) -> None:
    """With lines on the screen, and a curve at the end."""
    display = Display(trainer.config, trainer)

    def report(figures: Report) -> None:
        if metrics:
            metrics.append(dict(figures))
        display.report(figures)

    trainer.on_report, trainer.on_step = report, display.step
    display.say([opening(trainer)])
    try:
        trainer.run()
    except KeyboardInterrupt:
        display.close()
        display.say(["stopped; the same command with --resume goes on"])
        raise
    finally:
        display.close()
    if metrics:
        try:
            draw_curve(metrics, trainer.config.folder)
        except UserError as e:
            display.say([str(e)])


def make_trainer(config: TrainConfig, processes: Processes) -> Trainer:
    """The model, its data and what learns. Raises UserError."""
    if config.report_to:
        raise UserError("report_to is mlx_vlm_prune.train's alone; metrics.jsonl has every figure")
    torch.manual_seed(config.seed)
    folder = resolve_path(config.model) if config.model else CHECKPOINT
    checkpoint = read_start(config, folder)
    model = load_checkpoint(checkpoint, folder, processes.device)
    model.learned = read_learned(folder, model)
    processor = read_processor(checkpoint, model.config, config.model or "scenes", folder)
    images = Path(config.image_folder) if config.image_folder else None
    readers = {
        split: Reader(
            open_dataset(path, config.format, images), processor, model.config,
            config.max_seq_length, config.skip_bad, config.chat_template_config,
        )
        for split, path in split_files(Path(config.data)).items()
    }  # fmt: skip
    learner = LEARNERS[config.stage](model, checkpoint, folder, config)
    if config.grad_checkpoint:
        recompute_layers(model, learner.steps)
    return Trainer(config, learner, readers["train"], readers.get("valid"), processes)


def read_start(config: TrainConfig, folder: Path) -> Checkpoint:
    """What a run begins with: a model, or a language model's weights and a tower.

    The projector of these is untrained, its values from the seed. Raises UserError.
    """
    if config.tower is None:
        return read_checkpoint(folder)
    if config.model is None:
        raise UserError("tower goes with a language model's weights; name them by model")
    tokenizer = resolve_path(config.tokenizer) if config.tokenizer else None
    tower = resolve_path(config.tower)
    return read_checkpoint(folder, tower, tokenizer, projector_seed=config.seed)


def opening(trainer: Trainer) -> str:
    """What is about to learn, from what, and where."""
    c, learner, done = trainer.config, trainer.learner, trainer.progress.iteration
    numbers = sum(parameter.numel() for parameter in learner.parameters.values())
    return (
        f"{c.stage}: {numbers:,} numbers learn, in float32 on {learner.model.device};"
        f" {trainer.order.examples} examples, {trainer.iters} steps"
        + first_weights(learner.starts)
        + (f", of which {done} are done" if done else "")
    )
