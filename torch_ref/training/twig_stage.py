"""Stage `twig`: layers on an early layer's output learn to say the answers; the base stays.

TwigVLM's recipe (arXiv:2503.14075): the twig begins as the base's next layers, final norm and
output layer, and learns from the answers' loss with all visual tokens there.
"""

from pathlib import Path

import torch
from torch import Tensor

from mlx_vlm_prune.checkpoints.checkpoint import Checkpoint
from mlx_vlm_prune.checkpoints.config import MiniMindConfig
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.training.batches import Batch
from mlx_vlm_prune.training.config import TrainConfig
from mlx_vlm_prune.training.trained_folder import with_trained, write_trained

from ..models.language.twig import grown
from ..models.names import from_tensor
from ..models.splice import visible
from ..models.vlm import VLM
from .learner import Learner
from .loss import answer_rows, cross_entropy_sum, image_rows, pixels


class TwigStage(Learner):
    """A twig of `twig_layers` layers on layer `twig_layer`."""

    def __init__(self, model: VLM, checkpoint: Checkpoint, where: Path, config: TrainConfig):
        if config.pruner != "none":
            raise UserError(
                f"a twig learns with all visual tokens; leave out pruner {config.pruner}"
            )
        if not isinstance(model.config.text, MiniMindConfig):
            raise UserError("a twig grows on a language model of MiniMind's or Llama's kind only")
        super().__init__(model, checkpoint, where, config)
        self.starts = {"twig": True}

    def unfreeze_parts(self) -> None:
        """The twig alone."""
        c = self.config
        try:
            self.twig = grown(self.model.language, c.twig_layer, c.twig_layers)
        except ValueError as e:
            raise UserError(str(e)) from None
        self.beside = {f"twig.{name}": p for name, p in self.twig.named_parameters()}

    def held_out_loss(self, batch: Batch) -> Tensor:
        """Of the twig's words, summed over the answers' tokens."""
        model, language = self.model, self.model.language
        with torch.no_grad():
            spliced, _ = model.embed(batch.prompts, pixels(batch, model.device), self.steps)
            see_BLL, rotary = visible(spliced.real_BL), language.rotary(spliced.positions_BL)
            x_BLD = spliced.embeds_BLD
            for layer in language.layers[: int(self.twig.layer)]:
                x_BLD = layer(x_BLD, rotary, see_BLL[:, None], None)
        hidden_BLD = self.twig(x_BLD, spliced.positions_BL, see_BLL)
        hidden_AD = answer_rows(hidden_BLD, image_rows(spliced), batch)
        return cross_entropy_sum(self.twig.head(hidden_AD), batch)

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The same in training."""
        loss = self.held_out_loss(batch)
        return loss, loss

    def save_model(self, folder: Path) -> None:
        """Write the model with the twig beside it."""
        weights = {name: from_tensor(value) for name, value in self.twig.state_dict().items()}
        write_trained(with_trained(self.checkpoint, {}, {"twig": weights}), self.config, folder)
