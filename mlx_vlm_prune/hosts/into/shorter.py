"""The model of a family whose language model counts the rows it is given.

Its own tower and projector are run, tokens are dropped around the projector, and mlx-vlm puts the
others into a prompt with as many placeholders.

Shapes: L rows of the prompt, l of them left, k visual tokens among them, D features.
"""

from typing import Any

from mlx_vlm.models import llava as stock
from mlx_vlm.models.llava import (
    LanguageModel,
    ModelConfig,
    TextConfig,
    VisionConfig,
    VisionModel,
)

from .family import hand_over, left, mark, see
from .features import reduced
from .parts import one_prompt, shares

__all__ = ["LanguageModel", "Model", "ModelConfig", "TextConfig", "VisionConfig", "VisionModel"]


class Model(stock.Model):
    """mlx-vlm's own, but that the language model reads fewer tokens of an image."""

    def get_input_embeddings(
        self, input_ids: Any = None, pixel_values: Any = None, mask: Any = None, **told: Any
    ) -> Any:
        """The embeddings (1, l, D) of the rows that are left."""
        whole = super().get_input_embeddings
        if pixel_values is None or told.get("cached_image_features") is not None:
            return whole(input_ids, pixel_values, mask=mask, **told)
        ids = one_prompt(input_ids)
        images = see(self, pixel_values, ids, told)
        seen = [picture for pictures in images for picture in pictures]
        sizes = [[one.x_BND.shape[1] for one in pictures] for pictures in images]
        budgets = [K for own in sizes for K in shares(own)]
        kept, x_1kD = reduced(self, seen, budgets)
        rows_l = left(ids, mark(self, told), seen, kept)
        is_full = x_1kD.shape[1] == sum(map(sum, sizes))
        told["cached_image_features"] = hand_over(self, x_1kD, is_full)
        mask = None if mask is None else mask[:, rows_l]
        return whole(input_ids[:, rows_l], pixel_values, mask=mask, **told)
