"""mlx-vlm's arguments for a pruned prompt: ids, visual tokens, positions (three axes for Qwen).

Shapes: N visual tokens of a view, K kept of them, L rows of the whole prompt, l kept rows,
D features.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from ..checkpoints.errors import UserError
from ..models.pruning import ImageBatch
from ..pruners.contract import Policy, Reduction
from .host import Host
from .prepared_inputs import PreparedInputs
from .views import View


def kept_rows(
    host: Host, inputs: PreparedInputs, sizes: Sequence[int], reductions: Sequence[Reduction]
) -> list[int]:
    """Indices of the rows that stay: all words, and the placeholder of each kept visual token.

    `sizes` are the views' N. Pooled slots, which have no token of their own, take the first
    placeholders of their view.
    Raises UserError where the placeholders are not as many as the visual tokens.
    """
    placeholder, N = host.image_token_id(inputs), sum(sizes)
    is_kept_L = np.array(inputs.ids) != placeholder
    placeholders = np.flatnonzero(~is_kept_L)
    if host.placeholder_unit == "token":
        if len(placeholders) != N:
            raise UserError(
                f"the prompt has room for {len(placeholders)} visual tokens and the images have"
                f" {N}; an image's placeholder in the text counts, too"
            )
        by_view = np.split(placeholders, np.cumsum(sizes)[:-1])
        for rows_N, reduction in zip(by_view, reductions, strict=True):
            index_1K = reduction.kept_tokens()
            kept = slice(reduction.slots) if index_1K is None else index_1K[0]
            is_kept_L[rows_N[kept]] = True
    elif host.placeholder_unit == "image":
        is_kept_L[placeholders] = True
    else:  # one placeholder for all images
        is_kept_L[placeholders[:1]] = True
    return np.flatnonzero(is_kept_L).tolist()


def row_arguments(
    host: Host, inputs: PreparedInputs, rows: Sequence[int], policy: Policy
) -> dict[str, Any]:
    """Ids, mask and positions of the kept rows.

    Positions along one axis count rows, and are not given. Those along three come from the whole
    prompt. `rope_deltas` is what mlx-vlm adds to the number of rows to get the next position. Where
    every row stays mlx-vlm computes both itself.
    """
    ids_1L, grids_I3 = mx.array(inputs.ids)[None], inputs.extra.get("image_grid_thw")
    arguments: dict[str, Any] = {"input_ids": ids_1L, "mask": inputs.mask_1L}
    is_full = len(rows) == len(inputs.ids)
    if not is_full:
        rows_l = mx.array(np.array(rows, np.int32))
        arguments = {name: x_1L[:, rows_l] for name, x_1L in arguments.items()}
    if host.has_mrope and policy == "renumber":
        positions_l = mx.arange(len(rows), dtype=mx.int32)
        arguments["position_ids"] = mx.broadcast_to(positions_l, (3, 1, len(rows)))
        arguments["rope_deltas"] = mx.zeros((1, 1), mx.int32)
    elif host.has_mrope and is_full:
        arguments["image_grid_thw"] = grids_I3
    elif host.has_mrope:
        positions_31L, delta_11 = host.language.get_rope_index(
            ids_1L, grids_I3, None, inputs.mask_1L
        )
        arguments["position_ids"] = positions_31L[..., rows_l]
        arguments["rope_deltas"] = delta_11 + (len(inputs.ids) - len(rows))
    return arguments


def image_arguments(
    host: Host, inputs: PreparedInputs, views: Sequence[View], batches: Sequence[ImageBatch]
) -> dict[str, Any]:
    """The embeddings of the kept visual tokens, and what DeepStack adds to them."""
    x = [batch.signals.x_BND[0] for batch in batches]
    is_full = sum(map(len, x)) == sum(view.signals.x_BND.shape[1] for view in views)
    arguments: dict[str, Any] = {
        "cached_image_features": host.join_embeddings(x, is_full),
        "pixel_values": inputs.pixels,  # not read, but without it mlx-vlm looks for no image
    }
    pairs = zip(views, batches, strict=True)
    deepstack = [[batch.kept.apply(y)[0] for y in view.deepstack] for view, batch in pairs]
    if deepstack[0]:  # mlx-vlm 0.7 has none where it is given image features
        by_layer = zip(*deepstack, strict=True)
        arguments["deepstack_visual_embeds"] = [mx.concatenate(list(y)) for y in by_layer]
    if "image_token_index" in inputs.extra:
        arguments["image_token_index"] = inputs.extra["image_token_index"]
    return arguments
