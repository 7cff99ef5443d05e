"""The model of any family, with a method that needs more of its tower than a short file can have.

This one leans on mlx_vlm_prune, which must be installed where it is run.
"""

from typing import Any

from mlx_vlm.models import llava as stock
from mlx_vlm.models.llava import ModelConfig, TextConfig, VisionConfig, VisionModel

from mlx_vlm_prune.hosts.leaned_on import Pruning, shortened

from .mrope import LanguageModel, placed
from .parts import GLOBAL_IMAGE, KEEP_RATIO, KEEP_TOKENS

PRUNER = "random"  # as on the command line

__all__ = ["LanguageModel", "Model", "ModelConfig", "TextConfig", "VisionConfig", "VisionModel"]


class Model(stock.Model):
    """mlx-vlm's own, but that the language model reads fewer tokens of an image."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.language_model.__class__ = LanguageModel

    def get_input_embeddings(
        self, input_ids: Any = None, pixel_values: Any = None, mask: Any = None, **told: Any
    ) -> Any:
        """The embeddings of the rows that are left, behind as many as are gone, and where these
        stand."""
        self.language_model.is_asked = True
        try:
            found = self.shortened(input_ids, pixel_values, mask, told)
        finally:
            self.language_model.is_asked = False
        return placed(found, input_ids.shape[1], getattr(self, "vision_tower", None))

    def shortened(self, input_ids: Any, pixel_values: Any, mask: Any, told: dict[str, Any]) -> Any:
        whole = super().get_input_embeddings
        if pixel_values is None or told.get("cached_image_features") is not None:
            return whole(input_ids, pixel_values, mask=mask, **told)
        asked = Pruning(PRUNER, KEEP_RATIO, KEEP_TOKENS, GLOBAL_IMAGE)
        return shortened(self, whole, asked, input_ids, pixel_values, mask, told)
