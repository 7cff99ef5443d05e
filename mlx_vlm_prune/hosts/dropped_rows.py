"""Prompts of full length of which some rows are gone, and the call that leaves these out.

mlx-vlm's tools count a prompt by its ids: they cut, pad and split by that number, and a batch puts
prompts side by side by it. So a prompt keeps its length. The embedding of a row that is gone is
NaN and infinities, its position is -1, and both are left out at the last moment, when the language
model is called; whatever forgets to leave them out gives NaN, never a wrong answer, and the NaN of
a model that is broken is no such row.

Shapes: B prompts, L rows with those that are gone, l rows left, n rows of a piece, D features,
Y layers that DeepStack adds to, V visual rows left.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from ..checkpoints.errors import UserError
from ..models.cache import PADDING
from ..models.decoder import PREFILL_STEP_SIZE

EMBEDDINGS, DEEP = "inputs_embeds", "deepstack_visual_embeds"
BESIDE = ("position_ids", "visual_pos_masks", DEEP)  # what has an entry for each row, too
Stock = Callable[..., Any]


def to_full_length(
    L: int, columns: range, kept_rows: Sequence[int], features: Any, Y: int
) -> dict[str, mx.array]:
    """mlx-vlm's features of a prompt's kept rows, at full length: embeddings (L, D), and where a
    family has them positions (3, L), visual rows (L,) and DeepStack (L, Y, D).

    The prompt fills some columns; the others are padding. The last kept row stands last: a prompt
    that ends in an image would else end in nothing.
    """
    begin, end = columns.start, columns.stop
    at_l = np.array(kept_rows, np.int32) + begin
    at_l[-1] = end - 1
    at, x_lD = mx.array(at_l), features.inputs_embeds[0]
    l, D = x_lD.shape  # noqa: E741
    x_LD = mx.zeros((L, D), x_lD.dtype)
    x_LD[begin:end] = mx.where(mx.arange(D) == 0, mx.nan, mx.inf)
    x_LD[at] = x_lD
    laid = {EMBEDDINGS: x_LD}
    if features.position_ids is not None:
        place_3L = mx.ones((3, L), mx.int32)
        place_3L[:, begin:end] = PADDING
        place_3l = mx.broadcast_to(features.position_ids.reshape(-1, l), (3, l))
        place_3L[:, at] = place_3l.astype(mx.int32)
        laid["position_ids"] = place_3L
    if Y:
        visual_L = mx.zeros(L, mx.bool_)
        if features.visual_pos_masks is not None:
            visual_L[at] = features.visual_pos_masks[0]
        laid["visual_pos_masks"] = visual_L
        laid[DEEP] = deepstack_rows(visual_L, features.deepstack_visual_embeds, Y, x_lD)
    return laid


def deepstack_rows(
    visual_L: mx.array, deep: Sequence[mx.array] | None, Y: int, like: mx.array
) -> mx.array:
    """What DeepStack adds, (L, Y, D): `deep` has (V, D) for each layer; zeros for words."""
    deep_LYD = mx.zeros((len(visual_L), Y, like.shape[-1]), like.dtype)
    rows = _indices(visual_L)
    if rows.size and deep:
        deep_LYD[rows] = mx.stack(list(deep), axis=1).astype(like.dtype)
    return deep_LYD


def call(stock: Stock, reads_whole: bool, inputs: mx.array, arguments: dict[str, Any]) -> Any:
    """The language model on the rows that are there; while decoding all are.

    `reads_whole`: is a prompt not to be cut, since its rows see those behind them?
    """
    if arguments.get(EMBEDDINGS) is None:
        return stock(inputs, **arguments)
    x_BnD = arguments[EMBEDDINGS]
    gone_Bn = np.array(mx.isnan(x_BnD[..., 0]) & (x_BnD[..., 1:] == mx.inf).all(axis=-1))
    first = arguments["cache"][0] if arguments.get("cache") else None
    is_alone, is_batch = len(gone_Bn) == 1, hasattr(first, "left_padding")
    if gone_Bn.any() and not is_alone and not is_batch:
        raise UserError("several pruned prompts at once need a cache for a batch")
    if gone_Bn.any() and isinstance(arguments.get("mask"), mx.array):
        raise UserError("a mask of one's own does not fit a pruned prompt: leave it out")
    if is_batch:
        return _together(stock, reads_whole, inputs, arguments, gone_Bn)
    if not is_alone:
        return _read(stock, inputs, arguments)
    return _alone(stock, inputs, arguments, gone_Bn[0])


def _alone(stock: Stock, inputs: mx.array, arguments: dict[str, Any], gone_n: np.ndarray) -> Any:
    """One prompt, or a piece of it; what goes beside its embeddings may be of the whole."""
    if gone_n.any():
        left = _indices(~gone_n)
        inputs, arguments = inputs[:, left], arguments | _of_rows(arguments, [EMBEDDINGS], left)
    place = arguments.get("position_ids")
    if place is not None and place.ndim == 3 and place.shape[1] == 1:
        arguments = arguments | _of_rows(arguments, BESIDE, _indices(place[0, 0] != PADDING))
    if arguments[EMBEDDINGS].shape[1]:  # ids may be fewer, where one stands for an image
        return _read(stock, inputs, arguments)
    from mlx_vlm.models.base import LanguageModelOutput

    return LanguageModelOutput(logits=mx.zeros((1, 1, 1)))  # nobody reads a piece's


def _together(
    stock: Stock, reads_whole: bool, inputs: mx.array, arguments: dict[str, Any],
    gone_Bn: np.ndarray,
) -> Any:  # fmt: skip
    """A batch from its beginning: each row without what is gone, padded on its left anew. The last
    row is read by itself, as mlx-vlm does it: of a piece the logits are never computed."""
    cache, columns = arguments["cache"], np.arange(gone_Bn.shape[1])
    if cache[0].keys is not None:
        raise UserError("a batch with pruned prompts is read at once, and this one was cut")
    ahead_B = np.array(cache[0].left_padding)
    left = [np.flatnonzero((columns >= a) & ~g) for a, g in zip(ahead_B, gone_Bn, strict=True)]
    l = max(map(len, left))  # noqa: E741
    if reads_whole and min(map(len, left)) < l:
        raise UserError("prompts that see their own end share a batch only when equally long")
    if gone_Bn.any():
        moved = [l - len(rows) - int(a) for rows, a in zip(left, ahead_B, strict=True)]
        for layer in cache:
            layer.prepare(left_padding=moved)
    inputs, arguments = _padded(inputs, left, l, 0), {**arguments}
    for name in (EMBEDDINGS, *BESIDE):
        if (x := arguments.get(name)) is not None:
            arguments[name] = _padded(x, left, l, int(name == "position_ids" and x.ndim == 3))
    begin, out = 0, None
    for end in (
        [l]
        if reads_whole
        else sorted({*range(PREFILL_STEP_SIZE, l - 1, PREFILL_STEP_SIZE), l - 1, l} - {0})
    ):
        rows = slice(begin, end)
        piece = arguments | _of_rows(arguments, (EMBEDDINGS, *BESIDE), rows)
        out = _read(stock, inputs[:, rows], piece)
        mx.async_eval([layer.state for layer in cache])
        begin = end
    return out


def _padded(x: mx.array, left: Sequence[np.ndarray], l: int, axis: int) -> mx.array:  # noqa: E741
    """The rows that are left of each prompt, zeros ahead; prompts lie along `axis`, rows next."""
    parts = []
    for rows, x_L in zip(left, mx.split(x, x.shape[axis], axis), strict=True):
        x_l = mx.take(x_L, mx.array(rows.astype(np.int32)), axis + 1)
        ahead = [(l - len(rows), 0) if i == axis + 1 else (0, 0) for i in range(x.ndim)]
        parts.append(mx.pad(x_l, ahead))
    return mx.concatenate(parts, axis)


def _read(stock: Stock, inputs: mx.array, arguments: dict[str, Any]) -> Any:
    """With DeepStack's rows (B, l, Y, D) as mlx-vlm reads them: of each layer the visual ones."""
    deep_BlYD, visual_Bl = arguments.get(DEEP), arguments.get("visual_pos_masks")
    if isinstance(deep_BlYD, mx.array) and deep_BlYD.ndim == 4 and visual_Bl is not None:
        rows = _indices(visual_Bl)
        deep = list(deep_BlYD.flatten(0, 1)[rows].swapaxes(0, 1)) if rows.size else None
        visual_Bl = visual_Bl if rows.size else None
        arguments = {**arguments, DEEP: deep, "visual_pos_masks": visual_Bl}
    return stock(inputs, **arguments)


def _of_rows(
    arguments: dict[str, Any], names: Iterable[str], rows: slice | mx.array
) -> dict[str, Any]:
    """Those of the named arguments that are there, of some rows, which lie second or last."""
    there = {name: arguments[name] for name in names if arguments.get(name) is not None}
    is_second = (EMBEDDINGS, DEEP)
    return {n: x[:, rows] if n in is_second else x[..., rows] for n, x in there.items()}


def _indices(is_there: Any) -> mx.array:
    """Where an array is true, its rows one after another."""
    return mx.array(np.flatnonzero(np.array(is_there)).astype(np.int32))
