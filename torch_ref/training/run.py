"""A training run from its config: load, read, train, write."""

from pathlib import Path

import torch

from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.checkpoints.hub import resolve_path
from mlx_vlm_prune.inputs.processor import read_processor
from mlx_vlm_prune.scenes import CHECKPOINT
from mlx_vlm_prune.training.batches import Reader
from mlx_vlm_prune.training.config import TrainConfig
from mlx_vlm_prune.training.formats import open_dataset, split_files

from ..models.learned import read_learned
from ..models.loading import best_device, load_folder
from .stages import LEARNERS
from .trainer import Report, Trainer


def train(config: TrainConfig, device: torch.device | None = None) -> None:
    """Train as the config says, in float32. Raises UserError for what cannot be trained or read."""
    trainer(config, device).run()


def trainer(config: TrainConfig, device: torch.device | None = None) -> Trainer:
    """The run of a config, before its first step. Raises UserError."""
    if config.stage not in LEARNERS:
        raise UserError(f"stage {config.stage} is not trained here; mlx_vlm_prune.train has it")
    torch.manual_seed(config.seed)
    folder = resolve_path(config.model) if config.model else CHECKPOINT
    model, checkpoint = load_folder(folder, device or best_device())
    model.learned = read_learned(folder, model)
    processor = read_processor(checkpoint, model.config, config.model or "scenes", folder)
    images = Path(config.image_folder) if config.image_folder else None
    readers = {
        split: Reader(
            open_dataset(path, config.format, images), processor, model.config,
            config.max_seq_length, config.skip_bad,
        )
        for split, path in split_files(Path(config.data)).items()
    }  # fmt: skip
    learner = LEARNERS[config.stage](model, checkpoint, folder, config)
    return Trainer(config, learner, readers["train"], readers.get("valid"), _show)


def _show(report: Report) -> None:
    print(" ".join(f"{name} {value:.4g}" for name, value in report.items()), flush=True)
