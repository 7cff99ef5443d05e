"""A training run from its config: load, read, train, write."""

from pathlib import Path

import torch

from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.inputs.processor import read_processor
from mlx_vlm_prune.training.base_checkpoint import base_path, read_base
from mlx_vlm_prune.training.batches import Reader
from mlx_vlm_prune.training.config import TrainConfig
from mlx_vlm_prune.training.formats import open_dataset, split_files
from mlx_vlm_prune.training.session import train_together

from ..models.learned import read_learned
from ..models.loading import best_device, load_checkpoint
from .processes import Processes, own_device
from .recompute import recompute_layers
from .stages import LEARNERS
from .trainer import Trainer


def train(config: TrainConfig) -> None:
    """Train as the config says, in float32. Raises UserError for what cannot be trained or read."""
    processes = Processes(own_device(best_device()))
    train_together(config, processes, lambda: make_trainer(config, processes))


def make_trainer(config: TrainConfig, processes: Processes) -> Trainer:
    """The model, its data and what learns. Raises UserError."""
    if config.report_to:
        raise UserError("report_to is mlx_vlm_prune.train's alone; metrics.jsonl has every figure")
    torch.manual_seed(config.seed)
    folder, checkpoint = base_path(config), read_base(config)
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
