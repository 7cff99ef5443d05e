"""The model of a family whose language model counts the rows it is given.

Its own tower and projector are run, tokens are dropped around the projector, and mlx-vlm puts the
others into a prompt with as many placeholders.

Shapes: L rows of the prompt, l of them left, k visual tokens among them, D features.
"""

from typing import Any
from uuid import uuid4

import mlx.core as mx
from mlx_vlm.models import llava as stock
from mlx_vlm.models.base import LanguageModelOutput
from mlx_vlm.models.llava import ModelConfig, TextConfig, VisionConfig, VisionModel

from .ahead import ANEW, lengthened, passed_over, there
from .family import hand_over, left, mark, see
from .features import reduced
from .parts import one_prompt, shares

__all__ = ["LanguageModel", "Model", "ModelConfig", "TextConfig", "VisionConfig", "VisionModel"]


class Model(stock.Model):
    """mlx-vlm's own, but that the language model reads fewer tokens of an image."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.language_model.__class__ = LanguageModel

    def get_input_embeddings(
        self, input_ids: Any = None, pixel_values: Any = None, mask: Any = None, **told: Any
    ) -> Any:
        """The embeddings of the rows that are left, behind as many as are gone."""
        whole, L = super().get_input_embeddings, input_ids.shape[1]
        if pixel_values is None or told.get("cached_image_features") is not None:
            return lengthened(whole(input_ids, pixel_values, mask=mask, **told), L)
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
        return lengthened(whole(input_ids[:, rows_l], pixel_values, mask=mask, **told), L)


class LanguageModel(stock.LanguageModel):
    """mlx-vlm's own, but that it passes over rows that are gone, and reads no prefix again."""

    _position_ids = None  # who has such is asked for an index before a prefix is read again

    def __call__(
        self, inputs: Any, inputs_embeds: Any = None, gone_B: Any = None, **told: Any
    ) -> Any:
        if inputs_embeds is None:
            return super().__call__(inputs, **told)
        first = passed_over(inputs_embeds, cache := told.get("cache"), gone_B)
        if first == inputs_embeds.shape[1]:
            return LanguageModelOutput(mx.zeros((len(inputs_embeds), 1, 1)))  # which nobody reads
        x_BnD = there(inputs_embeds, first, cache)
        ids = None if inputs is None else inputs[:, first:]
        return super().__call__(ids, inputs_embeds=x_BnD, **told)

    def get_rope_index(self, *_: Any) -> Any:
        raise ValueError(ANEW)

    def apc_key_dependencies(self) -> tuple[str]:
        """What prefixes in mlx-vlm's automatic cache are found by: never the same twice."""
        return (uuid4().hex,)
