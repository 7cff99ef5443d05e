"""A training run from its config: load, read, train, write."""

from pathlib import Path

from ..checkpoints.errors import UserError
from ..models.loading import find_folder, load_folder
from .batches import Reader
from .config import TrainConfig
from .display import show
from .formats import open_dataset, split_files
from .stages import LEARNERS
from .trainer import Trainer


def train(config: TrainConfig) -> None:
    """Train as the config says. Raises UserError for what cannot be trained or read."""
    if config.stage not in LEARNERS:
        raise UserError(f"stage {config.stage} cannot be trained yet")
    model, processor = load_folder(
        find_folder(config.model), config.model or "scenes", config.dtype
    )
    images = Path(config.image_folder) if config.image_folder else None
    readers = {
        split: Reader(
            open_dataset(path, config.format, images), processor, model.config,
            config.max_seq_length, config.skip_bad,
        )
        for split, path in split_files(Path(config.data)).items()
    }  # fmt: skip
    learner = LEARNERS[config.stage](model, config)
    Trainer(config, learner, readers["train"], readers.get("valid"), show).run()
