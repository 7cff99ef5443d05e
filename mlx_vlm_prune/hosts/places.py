"""Rows of a prompt that stay, and where each of them stands.

Shapes: N visual tokens of a view, K kept, L rows of the whole prompt, l rows that stay.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from ..checkpoints.errors import UserError
from ..pruners.contract import Policy, Reduction
from .host import Host
from .views import Inputs


def kept_rows(
    host: Host, inputs: Inputs, sizes: Sequence[int], kept: Sequence[Reduction]
) -> list[int]:
    """Which rows stay: all words, and the placeholder of each slot's own token; slots without
    one take the first. `sizes` are the views' N.

    Raises UserError where the placeholders are not as many as the visual tokens.
    """
    placeholder, N = host.image_token_id(inputs), sum(sizes)
    room = inputs.ids.count(placeholder)
    if host.placeholders == "token" and room != N:
        raise UserError(
            f"the prompt has room for {room} visual tokens and the images have {N};"
            " an image's placeholder in the text counts, too"
        )
    if host.placeholders == "token" and sum(one.slots for one in kept) == N:
        return list(range(len(inputs.ids)))
    stays_L = np.array(inputs.ids) != placeholder
    at = np.flatnonzero(~stays_L)
    if host.placeholders != "token":
        stays_L[at if host.placeholders == "image" else at[:1]] = True
        return np.flatnonzero(stays_L).tolist()
    for rows, one in zip(np.split(at, np.cumsum(sizes)[:-1]), kept, strict=True):
        if one.slots < len(rows):
            rows = rows[: one.slots] if one.index_BK is None else rows[np.array(one.index_BK[0])]
        stays_L[rows] = True
    return np.flatnonzero(stays_L).tolist()


def row_arguments(
    host: Host, inputs: Inputs, rows: Sequence[int], policy: Policy
) -> dict[str, Any]:
    """The arguments that say to mlx-vlm which rows there are, and where.

    Positions of one axis count rows, and need no argument. Those of three come from the whole
    prompt, and so does what decoding adds to the number of rows (`rope_deltas`); where all rows
    stay, mlx-vlm finds both.
    """
    ids_1L = mx.array(inputs.ids)[None]
    arguments: dict[str, Any] = {"input_ids": ids_1L, "mask": inputs.mask_1L}
    is_full = len(rows) == len(inputs.ids)
    if not is_full:
        rows_l = mx.array(np.array(rows, np.int32))
        arguments = {name: x_1L[:, rows_l] for name, x_1L in arguments.items()}
    if host.has_mrope and policy == "renumber":
        place_l = mx.arange(len(rows), dtype=mx.int32)
        arguments["position_ids"] = mx.broadcast_to(place_l, (3, 1, len(rows)))
        arguments["rope_deltas"] = mx.zeros((1, 1), mx.int32)
    elif host.has_mrope and is_full:  # mlx-vlm's own
        arguments["image_grid_thw"] = inputs.extra.get("image_grid_thw")
    elif host.has_mrope:
        place_31L, delta_11 = host.language.get_rope_index(
            ids_1L, inputs.extra.get("image_grid_thw"), None, inputs.mask_1L
        )
        arguments["position_ids"] = place_31L[..., rows_l]
        arguments["rope_deltas"] = delta_11 + (len(inputs.ids) - len(rows))
    return arguments
