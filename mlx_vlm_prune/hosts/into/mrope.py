"""The model of a family of Qwen's, which tells its language model where every row stands.

What the tower hands over are embeddings already. So mlx-vlm puts all of them into the prompt
first; then rows leave, and with them their positions and what DeepStack would add to them.

Shapes: B prompts, L rows of one, l of them left, n of a piece, N visual tokens of an image, U of
all, V visual rows left, Y layers that DeepStack adds to, D features.
"""

from dataclasses import replace
from typing import Any
from uuid import uuid4

import mlx.core as mx
import numpy as np
from mlx_vlm.models import qwen3_vl as stock
from mlx_vlm.models.base import LanguageModelOutput
from mlx_vlm.models.qwen3_vl import ModelConfig, TextConfig, VisionConfig, VisionModel

from ...pruners.contract import Reduction, Signals
from .ahead import ANEW, lengthened, passed_over, there
from .parts import keep, one_prompt, shares

GONE = -1  # the position of a row that is gone

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
            whole = super().get_input_embeddings(input_ids, pixel_values, mask=mask, **told)
        finally:
            self.language_model.is_asked = False
        if pixel_values is not None and told.get("image_grid_thw") is not None:
            whole = self.shortened(whole, input_ids, told)
        return placed(whole, input_ids.shape[1], self.vision_tower)

    def shortened(self, whole: Any, input_ids: Any, told: Any) -> Any:
        """The rows that are left (1, l, D); a video keeps its frames."""
        if told.get("pixel_values_videos") is not None:
            return whole
        ids, m = one_prompt(input_ids), self.vision_tower.spatial_merge_size
        at_U = np.flatnonzero(np.array(ids) == self.config.image_token_id)
        grids = [(h // m, w // m) for _, h, w in told["image_grid_thw"].tolist()]
        kept, begin, stay = [], 0, np.array([], int)
        x_1LD = mx.array(whole.inputs_embeds)  # a copy, for it is written to
        for grid in grids:
            own_N = at_U[begin : begin + grid[0] * grid[1]]
            seen = Signals(x_1LD[:, mx.array(own_N)], grid)
            kept.append(keep(seen, shares([len(own_N)])[0]))
            own_K = own_N[np.array(kept[-1].index_BK)[0]]
            x_1LD[:, mx.array(own_K)] = kept[-1].apply(seen.x_BND)
            stay, begin = np.concatenate([stay, own_K]), begin + len(own_N)
        gone = np.setdiff1d(at_U, stay)
        rows_l = mx.array(np.delete(np.arange(len(ids)), gone))
        return replace(
            whole,
            inputs_embeds=x_1LD[:, rows_l],
            position_ids=whole.position_ids[..., rows_l],
            rope_deltas=whole.rope_deltas + len(gone),  # decoding counts rows and adds this
            **added(whole, kept, grids, rows_l),
        )


class LanguageModel(stock.LanguageModel):
    """mlx-vlm's own, but that it passes over rows that are gone, and reads no prefix again."""

    is_asked = False  # where the rows of a prompt stand, by the model itself
    _position_ids: Any = None  # who has such is asked before a prefix is read again

    def __call__(
        self, inputs: Any, inputs_embeds: Any = None, gone_B: Any = None, **told: Any
    ) -> Any:
        if inputs_embeds is None:
            return super().__call__(inputs, **told)
        cache, is_alone = told.get("cache"), len(inputs_embeds) == 1
        first = passed_over(inputs_embeds, cache, gone_B)
        if first == inputs_embeds.shape[1]:
            return LanguageModelOutput(mx.zeros((len(inputs_embeds), 1, 1)))  # which nobody reads
        x_BnD = there(inputs_embeds, first, cache)
        told |= later(told, None if is_alone else first)
        return super().__call__(inputs[:, first:], inputs_embeds=x_BnD, **told)

    def get_rope_index(self, *ids: Any, **told: Any) -> Any:
        """mlx-vlm asks for this, too, before it reads a prefix again."""
        if not self.is_asked:
            raise ValueError(ANEW)
        return super().get_rope_index(*ids, **told)

    def apc_key_dependencies(self) -> tuple[str]:
        """What prefixes in mlx-vlm's automatic cache are found by: never the same twice."""
        return (uuid4().hex,)


def placed(found: Any, L: int, tower: Any) -> Any:
    """The prompts in L rows again, and so what is told of each row; DeepStack's of words are 0."""
    B, n, D = found.inputs_embeds.shape
    ahead, Y = (max(0, L - n), 0), len(getattr(tower, "deepstack_visual_indexes", ()))
    place, visual_Bn, deep = found.position_ids, found.visual_pos_masks, None
    if place is not None:
        place = mx.pad(place, [(0, 0)] * (place.ndim - 1) + [ahead], constant_values=GONE)
    if Y:
        visual_Bn = mx.zeros((B, n), mx.bool_) if visual_Bn is None else visual_Bn
        deep = mx.zeros((B * n, Y, D), found.inputs_embeds.dtype)
        rows_V = np.flatnonzero(np.array(visual_Bn))
        if len(rows_V) and found.deepstack_visual_embeds is not None:
            deep[mx.array(rows_V)] = mx.stack(found.deepstack_visual_embeds, 1).astype(deep.dtype)
        deep = mx.pad(deep.reshape(B, n, Y, D), [(0, 0), ahead, (0, 0), (0, 0)])
        visual_Bn = mx.pad(visual_Bn, [(0, 0), ahead])
    return replace(
        lengthened(found, L),
        position_ids=place,
        visual_pos_masks=visual_Bn,
        deepstack_visual_embeds=deep,
    )


def later(told: dict[str, Any], first: int | None) -> dict[str, Any]:
    """What is told row by row, without the first; of a prompt that is alone, as many as are gone,
    for some tools tell of the whole prompt with each piece."""
    place, visual_Bn = told.get("position_ids"), told.get("visual_pos_masks")
    if place is None:
        return {}
    if first is None:
        first = int((place.flatten(0, -2)[0] == GONE).sum())
    if visual_Bn is None or told.get("deepstack_visual_embeds") is None:
        return {"position_ids": place[..., first:]}
    visual_Bn = visual_Bn[:, first:]
    rows_V = mx.array(np.flatnonzero(np.array(visual_Bn)))
    deep_VYD = told["deepstack_visual_embeds"][:, first:].flatten(0, 1)[rows_V]
    deep = [deep_VYD[:, y] for y in range(deep_VYD.shape[1])] if rows_V.size else None
    return {
        "position_ids": place[..., first:],
        "visual_pos_masks": visual_Bn if deep else None,
        "deepstack_visual_embeds": deep,
    }


def added(
    whole: Any, kept: list[Reduction], grids: list[tuple[int, int]], rows_l: mx.array
) -> dict[str, Any]:
    """What DeepStack adds to the visual rows in the first layers, where there is such."""
    if whole.deepstack_visual_embeds is None:
        return {}
    layers = []
    for y_UD in whole.deepstack_visual_embeds:
        begin, parts = 0, []
        for one, (rows, columns) in zip(kept, grids, strict=True):
            end = begin + rows * columns
            parts.append(one.apply(y_UD[None, begin:end])[0])
            begin = end
        layers.append(mx.concatenate(parts))
    visual_1l = whole.visual_pos_masks[:, rows_l]
    return {"deepstack_visual_embeds": layers, "visual_pos_masks": visual_1l}
