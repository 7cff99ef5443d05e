"""Rows of a prompt that stay, and where each of them stands.

Shapes: N visual tokens of a view, K kept, L rows of the whole prompt, l rows left.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from ..checkpoints.errors import UserError
from ..pruners.contract import Policy, Reduction
from .families import Family
from .views import Inputs


def left(
    inputs: Inputs,
    family: Family,
    placeholder: int,
    sizes: Sequence[int],
    kept: Sequence[Reduction],
) -> list[int]:
    """Which rows stay: all words, and the placeholder of each slot's own token; slots without
    one take the first. `sizes` are the views' N."""
    room, N = inputs.ids.count(placeholder), sum(sizes)
    if family.placeholders == "token" and room != N:
        raise UserError(
            f"the prompt has room for {room} visual tokens and the images have {N};"
            " an image's placeholder in the text counts, too"
        )
    if family.placeholders == "token" and sum(one.slots for one in kept) == N:
        return list(range(len(inputs.ids)))
    stays_L = np.array(inputs.ids) != placeholder
    at = np.flatnonzero(~stays_L)
    if family.placeholders != "token":
        stays_L[at if family.placeholders == "image" else at[:1]] = True
        return np.flatnonzero(stays_L).tolist()
    for own, one in zip(np.split(at, np.cumsum(sizes)[:-1]), kept, strict=True):
        if one.slots < len(own):
            own = own[: one.slots] if one.index_BK is None else own[np.array(one.index_BK[0])]
        stays_L[own] = True
    return np.flatnonzero(stays_L).tolist()


def shortened(
    model: Any, family: Family, inputs: Inputs, rows: Sequence[int], policy: Policy
) -> dict[str, Any]:
    """The arguments that tell mlx-vlm which rows there are, and where.

    Positions of one axis count rows, and need no telling. Those of three come from the whole
    prompt, and so does what decoding adds to the number of rows (`rope_deltas`); where all rows
    stay, mlx-vlm finds both.
    """
    ids_1L = mx.array(inputs.ids)[None]
    told: dict[str, Any] = {"input_ids": ids_1L, "mask": inputs.mask_1L}
    is_full = len(rows) == len(inputs.ids)
    if not is_full:
        rows_l = mx.array(np.array(rows, np.int32))
        told = {name: x_1L[:, rows_l] for name, x_1L in told.items()}
    if family.has_mrope and policy == "renumber":
        place_l = mx.arange(len(rows), dtype=mx.int32)
        told["position_ids"] = mx.broadcast_to(place_l, (3, 1, len(rows)))
        told["rope_deltas"] = mx.zeros((1, 1), mx.int32)
    elif family.has_mrope and is_full:  # mlx-vlm's own
        told["image_grid_thw"] = inputs.extra.get("image_grid_thw")
    elif family.has_mrope:
        place_31L, delta_11 = model.language_model.get_rope_index(
            ids_1L, inputs.extra.get("image_grid_thw"), None, inputs.mask_1L
        )
        told["position_ids"] = place_31L[..., rows_l]
        told["rope_deltas"] = delta_11 + (len(inputs.ids) - len(rows))
    return told
