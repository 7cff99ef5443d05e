"""The model of a family of Qwen's, which tells its language model where every row stands.

What the tower hands over are embeddings already. So mlx-vlm puts all of them into the prompt
first; then rows leave, and with them their positions and what DeepStack would add to them.

Shapes: L rows of the prompt, l of them left, N visual tokens of an image, U of all, D features.
"""

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_vlm.models import qwen3_vl as stock
from mlx_vlm.models.qwen3_vl import (
    LanguageModel,
    ModelConfig,
    TextConfig,
    VisionConfig,
    VisionModel,
)

from ...pruners.contract import Reduction, Signals
from .parts import keep, one_prompt, shares

__all__ = ["LanguageModel", "Model", "ModelConfig", "TextConfig", "VisionConfig", "VisionModel"]


class Model(stock.Model):
    """mlx-vlm's own, but that the language model reads fewer tokens of an image."""

    def get_input_embeddings(
        self, input_ids: Any = None, pixel_values: Any = None, mask: Any = None, **told: Any
    ) -> Any:
        """The embeddings (1, l, D) of the rows that are left, and where these stand."""
        whole = super().get_input_embeddings(input_ids, pixel_values, mask=mask, **told)
        has_video = told.get("pixel_values_videos") is not None  # it keeps its frames
        if pixel_values is None or told.get("image_grid_thw") is None or has_video:
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
