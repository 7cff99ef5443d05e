"""Rows of a prompt that stay, and where each of them stands.

Shapes: N visual tokens of a view, K kept, L rows of the whole prompt, l rows left.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from convert.errors import UserError

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
    at = [row for row, token in enumerate(inputs.ids) if token == placeholder]
    if family.placeholders != "token":
        gone = set(at[1:]) if family.placeholders == "all" else set()
        return [row for row in range(len(inputs.ids)) if row not in gone]
    if len(at) != sum(sizes):
        raise UserError(
            f"the prompt has room for {len(at)} visual tokens and the images have {sum(sizes)};"
            " an image's placeholder in the text counts, too"
        )
    rows, begin = sorted(set(range(len(inputs.ids))) - set(at)), 0
    for size, one in zip(sizes, kept, strict=True):
        own = np.arange(one.slots) if one.index_BK is None else np.array(one.index_BK[0])
        rows += [at[begin + i] for i in own]
        begin += size
    return sorted(rows)


def shortened(
    model: Any, family: Family, inputs: Inputs, rows: Sequence[int], policy: Policy
) -> dict[str, Any]:
    """The arguments that tell mlx-vlm which rows there are, and where.

    Positions of one axis count rows, and need no telling. Those of three come from the whole
    prompt, and so does what decoding adds to the number of rows (`rope_deltas`).
    """
    ids_1L, rows_l = mx.array(inputs.ids)[None], mx.array(np.array(rows, np.int32))
    told: dict[str, Any] = {"input_ids": ids_1L[:, rows_l], "mask": inputs.mask_1L[:, rows_l]}
    if family.has_mrope and policy == "renumber":
        place_l = mx.arange(len(rows), dtype=mx.int32)
        told["position_ids"] = mx.broadcast_to(place_l, (3, 1, len(rows)))
        told["rope_deltas"] = mx.zeros((1, 1), mx.int32)
    elif family.has_mrope:
        place_31L, delta_11 = model.language_model.get_rope_index(
            ids_1L, inputs.extra.get("image_grid_thw"), None, inputs.mask_1L
        )
        told["position_ids"] = place_31L[..., rows_l]
        told["rope_deltas"] = delta_11 + (len(inputs.ids) - len(rows))
    return told
