"""A whole CLIP (arXiv:2103.00020) or SigLIP (arXiv:2303.15343): images and texts to embeddings.

CLIP's embedding of an image is its CLS token, so nothing that leaves behind the last layer changes
it: tokens leave ahead of the tower or inside. SigLIP's head reads the tower's tokens, so they may
leave behind it, too.

Shapes: I images, T texts, L tokens of a text, N patches, K kept, D features.
"""

import mlx.core as mx
import numpy as np
from mlx import nn

from ..checkpoints.dual_encoder import DualEncoderConfig
from ..checkpoints.errors import UserError
from ..machine.clock import end_part
from ..pruners import Pipeline, Stage, StepBudgets
from .image_encoder import ImageEncoder
from .pruning import ImageBatch, prune
from .towers.pooling import PoolingHead
from .towers.signals import Cut, Encoded
from .towers.text import TextTower
from .towers.vit import ACTIVATIONS, VisionTower

WHERE = {  # methods of these stages work on what a CLIP or SigLIP alone has not
    Stage.PROJECTED: "chooses among the tokens behind a projector",
    Stage.DECODER: "works between a language model's layers",
}


class DualEncoder(ImageEncoder):
    """An image encoder and a text encoder whose embeddings can be compared."""

    config: DualEncoderConfig

    def __init__(self, config: DualEncoderConfig):
        super().__init__()
        self.config, dims = config, config.dims
        vision_act, text_act = (ACTIVATIONS[name] for name in config.hidden_acts)
        self.tower = VisionTower(config.vision, vision_act)
        self.text = TextTower(config.text, None if config.is_clip else dims, text_act)
        self.logit_scale = mx.array(0.0)
        if config.is_clip:
            self.visual_projection = nn.Linear(config.vision.hidden_size, dims, bias=False)
            self.text_projection = nn.Linear(config.text.hidden_size, dims, bias=False)
        else:
            self.head, self.logit_bias = PoolingHead(config.vision, vision_act), mx.array(0.0)

    def encode_images(self, pixels_IHW3: mx.array, pipeline: Pipeline, K: int) -> mx.array:
        """Embeddings (I, D) from K of N tokens, as `get_image_features` gives them for all.

        Raises UserError, as `check` does.
        """
        self.check(pipeline)
        budgets = pipeline.budgets(self.N, K)
        encoded = self.run_tower(pixels_IHW3, pipeline, budgets)
        if self.config.is_clip:
            return self._project_cls(encoded)
        batches, _ = prune([ImageBatch.of(encoded.signals)], budgets, Stage.FEATURES)
        return end_part("vision", mx.concatenate([self._pool(batch) for batch in batches]))

    def encode_texts(self, ids_TL: np.ndarray) -> mx.array:
        """Embeddings (T, D), as `get_text_features` gives them."""
        x_TD = self.text(ids_TL)
        return self.text_projection(x_TD) if self.config.is_clip else x_TD

    def check(self, pipeline: Pipeline) -> None:
        """Raise UserError, with the reason, for a method that has no effect here, or no place."""
        title = self.config.title
        for step in pipeline.steps:
            if step.stage in WHERE:
                raise UserError(f"{step.name} {WHERE[step.stage]}, and a {title} alone has none")
            if step.stage is Stage.FEATURES and self.config.is_clip and step.name != "none":
                raise UserError(
                    f"{step.name} chooses among the tower's outputs, and CLIP's embedding is its"
                    " CLS token, which no longer reads them: nothing would change; choose a method"
                    " that works in the tower or ahead of it"
                )
        if pipeline.enhancers:
            raise UserError(
                f"{pipeline.enhancers[0].name} serves a language model's attention, and a {title}"
                " alone has none"
            )

    def plan_tower(self, budgets: StepBudgets) -> tuple[list[tuple[int, int]], list[Cut]]:
        """Raises UserError, too, where CLS does not read what is left."""
        grids, cuts = super().plan_tower(budgets)
        last = self.config.vision.depth - 1
        for step, _ in budgets.at(Stage.ENCODER) if self.config.is_clip else ():
            places = {(cut.layer, cut.place) for cut in cuts if cut.pruner is step}
            if places == {(last, "middle")}:
                raise UserError(
                    f"{step.spec} drops tokens behind the attention of layer {last}, the last, so"
                    " CLIP's embedding would not change; give an earlier layer, as in"
                    f" {step.name}:layer={last // 2}"
                )
        return grids, cuts

    def _project_cls(self, encoded: Encoded) -> mx.array:
        assert encoded.cls_BD is not None
        normed_BD = self.tower.post_layernorm(encoded.cls_BD)
        return end_part("vision", self.visual_projection(normed_BD))

    def _pool(self, batch: ImageBatch) -> mx.array:
        """A merged token counts as often as it has members, where the tower counts it so."""
        size_BN = batch.signals.get("size_BN")
        bias_BN = None if size_BN is None else mx.log(size_BN)
        return self.head(batch.signals.x_BND, bias_BN)

    @property
    def dtype(self) -> mx.Dtype:
        return self.tower.post_layernorm.weight.dtype
