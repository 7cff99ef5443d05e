"""Stage `twig`: layers on an early layer's output learn to say the answers; the base stays.

TwigVLM's recipe (arXiv:2503.14075): the twig begins as the base's next layers, final norm and
output layer, and learns from the answers' loss with all visual tokens there.

Shapes: A tokens of answers, L rows, D features, V words.
"""

from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import mlx.core as mx
from mlx.utils import tree_flatten

from ..checkpoints.config import MiniMindConfig
from ..checkpoints.errors import UserError
from ..models.language.experts import unstacked
from ..models.language.minimind import MiniMind
from ..models.language.twig import grown
from ..models.layers import run_layers
from ..models.vlm import VLM
from .batches import Batch
from .config import TrainConfig
from .learner import Learner
from .loss import answer_rows, cross_entropy_sum, pixels
from .save_model import save_model


class TwigStage(Learner):
    """A twig of `twig_layers` layers on layer `twig_layer`. The model answers as before."""

    counts_answers = False

    def __init__(self, model: VLM, config: TrainConfig):
        if config.pruner != "none":
            raise UserError(
                f"a twig learns with all visual tokens; leave out pruner {config.pruner}"
            )
        if not isinstance(model.config.text, MiniMindConfig):
            raise UserError("a twig does not grow on a language model of mlx-lm's")
        if model.config.quantization:
            raise UserError(
                "a twig begins as layers of the language model, which is quantized here; undo -q"
                " by mlx-vlm-prune convert to-mlx --dequantize"
            )
        super().__init__(model, config)
        self.starts = MappingProxyType({"twig": True})

    def unfreeze_parts(self) -> None:
        """The twig alone."""
        c, language = self.settings, self.model.language
        assert isinstance(language, MiniMind)
        self.twig = grown(language, c.twig_layer, c.twig_layers)

    def losses(self, batch: Batch) -> tuple[mx.array, mx.array]:
        """Of the twig's words, summed over the answers' tokens."""
        model, twig = self.model, self.twig
        images = pixels(batch, model.dtype)
        spliced = model.splice_images(batch.prompts, images, self.pipeline, self.K).spliced
        language = model.language
        below = range(twig.layer)
        x_BLD = mx.stop_gradient(
            run_layers(language, below, spliced, language.make_cache(), spliced.L)
        )
        every, at_layer = range(len(twig.layers)), replace(spliced, x_BLD=x_BLD)
        x_BLD = run_layers(twig, every, at_layer, twig.make_cache(), spliced.L)
        logits_AV = twig.logits(x_BLD[answer_rows(spliced, batch)])
        loss = cross_entropy_sum(logits_AV, mx.array(batch.targets_A))
        return loss, loss

    def save_model(self, folder: Path) -> None:
        """Write the model with the twig beside it."""
        weights = unstacked(dict(tree_flatten(self.twig.parameters())))
        weights["layer"] = mx.array([float(self.twig.layer)])
        save_model(self.model, {"twig": weights}, self.settings, folder)
