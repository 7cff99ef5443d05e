"""What learns in a stage: which parameters move, and the loss that moves them.

A stage is a `Learner`. Its trainable parameters are what the optimizer changes, and what a
checkpoint holds.
"""

from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
from mlx import nn

from ..checkpoints.errors import UserError
from ..models.vlm import VLM
from ..pruners import Pipeline, plan
from ..pruners.budget import budget
from .batches import Batch
from .config import TrainConfig
from .loss import answer_loss


class Learner(nn.Module):
    """A model, of which some parts learn to answer behind a pruner."""

    parts: Sequence[str] = ()  # of the model that the stage trains, unless `freeze` names them

    def __init__(self, model: VLM, config: TrainConfig):
        super().__init__()
        self.model = model
        self.settings = config
        self.pipeline: Pipeline = plan(config.pruner, model.learned)
        self.K = budget(model.N, config.keep_ratio, config.keep_tokens, self.pipeline)
        self.freeze()
        self.unfreeze_parts()
        if not self.trainable_parameters():
            raise UserError(f"nothing is left to learn in stage {config.stage}")

    def unfreeze_parts(self) -> None:
        """Make trainable what the stage trains."""
        for part in self.parts:
            if part not in self.settings.freeze and part in self.model:
                self.model[part].unfreeze()

    def write(self, folder: Path, iteration: int) -> None:
        """What a user loads afterwards, ahead of the checkpoint of this step."""

    def loss(self, batch: Batch) -> mx.array:
        """Summed over the answers' tokens."""
        return answer_loss(self.model, batch, self.pipeline, self.K)


class Pretrain(Learner):
    """The projector learns what a language model reads (EfficientVLM's and LLaVA's first stage)."""

    parts = ("projector", "pruner")


class FineTune(Learner):
    """Projector, pruner and language model learn (EfficientVLM's second stage)."""

    parts = ("projector", "pruner", "language")
