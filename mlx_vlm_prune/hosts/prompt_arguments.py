"""mlx-vlm's arguments for a pruned prompt: ids, visual tokens, positions (three axes for Qwen).

Shapes: N visual tokens of a view, K kept of them, L rows of the whole prompt, l kept rows,
D features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ..checkpoints.errors import UserError
from ..models.pruning import ImageBatch
from ..pruners.contract import Policy, Reduction
from .host import Host
from .prepared_inputs import PreparedInputs
from .views import View

GRIDS = ("image_grid_thw", "video_grid_thw")  # of pictures and of clips, by mlx-vlm's names


@dataclass(frozen=True)
class KeptRows:
    """The rows of the whole prompt that stay: all words, and those of the kept visual tokens.

    How many stay is known before the choice, which ones only on the device.
    """

    columns: list[int]  # as many, as if each view's first placeholders stayed
    rows_l: mx.array  # those that stay, ascending; not to be read on the host
    has_breaks: bool = False  # do words stand between the placeholders of a view?

    def __len__(self) -> int:
        return len(self.columns)

    @classmethod
    def known(cls, rows: Sequence[int]) -> "KeptRows":
        """Rows that no choice decides."""
        return cls(list(rows), row_numbers(rows))


def kept_rows(
    host: Host, inputs: PreparedInputs, views: Sequence[View], reductions: Sequence[Reduction]
) -> KeptRows:
    """The rows that stay: all words, and the placeholder of each kept visual token.

    Pooled slots, which have no token of their own, take the first placeholders of their view.
    Nothing is read on the host. Raises UserError where placeholders and visual tokens differ.
    """
    N = sum(view.N for view in views)
    is_kept_L = np.array(inputs.ids) != host.image_token_id(inputs)
    words, placeholders = np.flatnonzero(is_kept_L), np.flatnonzero(~is_kept_L)
    parts, has_breaks = list[mx.array](), False
    if host.placeholder_unit == "token":
        by_view = rows_of_views(host, inputs, views)
        if sum(reduction.slots for reduction in reductions) == N:
            breaks = np.setdiff1d(placeholders, np.concatenate(by_view))
            is_kept_L[breaks] = True
            parts.append(row_numbers(breaks))
        for rows_N, reduction in zip(by_view, reductions, strict=True):
            first_K = rows_N[: reduction.slots]
            is_kept_L[first_K] = True
            if reduction.index_BK is None or reduction.slots == len(rows_N):
                parts.append(row_numbers(first_K))
            else:
                parts.append(row_numbers(rows_N)[reduction.index_BK[0]])
                has_breaks |= bool(((words > rows_N[0]) & (words < rows_N[-1])).any())
    elif host.placeholder_unit == "image":
        is_kept_L[placeholders] = True
    else:
        is_kept_L[host.placeholders_of_blocks(placeholders, views, reductions)] = True
    columns = np.flatnonzero(is_kept_L).tolist()
    if not parts:
        return KeptRows.known(columns)
    return KeptRows(columns, mx.sort(mx.concatenate([row_numbers(words), *parts])), has_breaks)


def rows_of_views(host: Host, inputs: PreparedInputs, views: Sequence[View]) -> list[np.ndarray]:
    """The rows of the whole prompt that each view's visual tokens take, where each has a
    placeholder. Raises UserError where these are not as many."""
    placeholders = np.flatnonzero(np.array(inputs.ids) == host.image_token_id(inputs))
    is_token = np.concatenate([view.is_token for view in views])
    if len(placeholders) != len(is_token):
        raise UserError(
            f"the prompt has room for {len(placeholders)} visual tokens and the images have"
            f" {len(is_token)}; an image's placeholder in the text counts, too"
        )
    ends = np.cumsum([view.N for view in views])[:-1]
    return np.split(placeholders[is_token], ends)


def bias_rows(
    host: Host, inputs: PreparedInputs, views: Sequence[View], batches: Sequence[ImageBatch],
    biases: Sequence[mx.array | None], rows: KeptRows,
) -> mx.array | None:  # fmt: skip
    """What is added to the attention that each row gets (l,), by the biases (1, K) of each view;
    None where nothing is."""
    dtype = batches[0].signals.x_BND.dtype
    if all(bias_1K is None for bias_1K in biases):
        return None
    bias_by_view = [
        mx.zeros(batch.slots, dtype) if bias_1K is None else bias_1K[0].astype(dtype)
        for batch, bias_1K in zip(batches, biases, strict=True)
    ]
    is_placeholder_L = np.array(inputs.ids) == host.image_token_id(inputs)
    if host.placeholder_unit == "token":
        bias_L, by_view = mx.zeros(len(inputs.ids), dtype), rows_of_views(host, inputs, views)
        for rows_N, batch, bias_K in zip(by_view, batches, bias_by_view, strict=True):
            assert batch.kept.index_BK is not None
            bias_L[row_numbers(rows_N)[batch.kept.index_BK[0]]] = bias_K
        return bias_L[rows.rows_l]
    parts = list[mx.array]()
    blocks: Any = bias_by_view
    if host.placeholder_unit == "all":  # blocks of one length
        blocks = mx.split(mx.concatenate(blocks), int(is_placeholder_L[rows.columns].sum()))
    for column in rows.columns:
        parts.append(blocks.pop(0) if is_placeholder_L[column] else mx.zeros(1, dtype))
    return mx.concatenate(parts)


def row_numbers(rows: Sequence[int] | np.ndarray) -> mx.array:
    """Numbers of rows that are known on the host."""
    return mx.array(np.array(rows, np.int32))


def row_arguments(
    host: Host, inputs: PreparedInputs, rows: KeptRows, policy: Policy
) -> dict[str, Any]:
    """Ids, mask and positions of the kept rows.

    mlx-vlm looks for placeholders among the ids on the host. They are the same whichever tokens of
    a view stay, unless words stand between its placeholders, as Pixtral's breaks do: then mlx-vlm
    waits for the choice.
    Positions along one axis count rows, and are not given. Those along three come from the whole
    prompt. `rope_deltas` is what mlx-vlm adds to the number of rows to get the next position. Where
    every row stays mlx-vlm computes both itself.
    """
    ids_1L = mx.array(inputs.ids)[None]
    arguments: dict[str, Any] = {"input_ids": ids_1L, "mask": inputs.mask_1L}
    arguments |= {name: inputs.extra[name] for name in host.per_row_inputs if name in inputs.extra}
    is_full = len(rows) == len(inputs.ids)
    if not is_full:
        rows_l = rows.rows_l if rows.has_breaks else row_numbers(rows.columns)
        arguments = {name: x_1L[:, rows_l] for name, x_1L in arguments.items()}
    arguments["input_ids"] = host.arrange_ids(arguments["input_ids"])
    if host.has_mrope and policy == "renumber":
        positions_l = mx.arange(len(rows), dtype=mx.int32)
        arguments["position_ids"] = mx.broadcast_to(positions_l, (3, 1, len(rows)))
        arguments["rope_deltas"] = mx.zeros((1, 1), mx.int32)
    elif host.has_mrope and is_full:
        arguments |= {name: inputs.extra.get(name) for name in GRIDS}
    elif host.has_mrope:
        positions_31L, delta_11 = mrope_index(host, inputs)
        arguments["position_ids"] = positions_31L[..., rows.rows_l]
        arguments["rope_deltas"] = delta_11 + (len(inputs.ids) - len(rows))
    return arguments


def mrope_index(host: Host, inputs: PreparedInputs) -> tuple[mx.array, mx.array]:
    """The positions (3, 1, L) of the whole prompt's rows, and what mlx-vlm adds to the number of
    rows for the next position (1, 1), by mlx-vlm's own rule."""
    grids = [inputs.extra.get(name) for name in GRIDS]
    positions: tuple[mx.array, mx.array] = host.language.get_rope_index(
        mx.array(inputs.ids)[None], *grids, inputs.mask_1L
    )
    return positions


def image_arguments(
    host: Host, inputs: PreparedInputs, views: Sequence[View], batches: Sequence[ImageBatch]
) -> dict[str, Any]:
    """The embeddings of the kept visual tokens, and what DeepStack adds to them."""
    x = [batch.signals.x_BND[0] for batch in batches]
    is_full = sum(map(len, x)) == sum(view.N for view in views)
    arguments: dict[str, Any] = {
        "cached_image_features": host.image_embeddings(views, x, is_full),
        "pixel_values": inputs.pixels,  # not read, but without it mlx-vlm looks for no image
    }
    pairs = zip(views, batches, strict=True)
    deepstack = [
        [batch.kept_of_encoded.apply(y)[0] for y in view.deepstack] for view, batch in pairs
    ]
    if deepstack[0]:  # mlx-vlm 0.7 has none where it is given image features
        by_layer = zip(*deepstack, strict=True)
        arguments["deepstack_visual_embeds"] = [mx.concatenate(list(y)) for y in by_layer]
    if "image_token_index" in inputs.extra:
        arguments["image_token_index"] = inputs.extra["image_token_index"]
    return arguments
