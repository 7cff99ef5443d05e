"""Prompts of full length of which some rows are gone, and the call that leaves these out.

mlx-vlm's tools count a prompt by its ids: they cut, pad and split by that number, and a batch puts
prompts side by side by it. So a prompt keeps its length. The embedding of a row that is gone is
NaN and infinities, its position is -1, and both are left out at the last moment, when the language
model is called; whatever forgets to leave them out gives NaN, never a wrong answer, and the NaN of
a model that is broken is no such row.

Shapes: B prompts, L rows with those that are gone, l rows left, n rows of a piece, D features,
Y layers that DeepStack adds to, V visual rows left.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ..checkpoints.errors import UserError

GONE = -1  # the position of a row that is gone
PIECE = 2048  # rows of a batch read at once
ALIGNED = ("position_ids", "visual_pos_masks")  # what is told row by row, rows last
Stock = Callable[..., Any]


@dataclass(frozen=True)
class Laid:
    """A prompt's rows: embeddings (L, D), positions (3, L), visual rows (L,), DeepStack (L, Y, D);
    None where a family has no such thing."""

    x_LD: mx.array
    place_3L: mx.array | None = None
    visual_L: mx.array | None = None
    deep_LYD: mx.array | None = None


def laid_out(
    L: int, columns: range, kept_rows: Sequence[int], x_lD: mx.array,
    place_3l: mx.array | None, visual_l: mx.array | None, deep: Sequence[mx.array],
) -> Laid:  # fmt: skip
    """The kept rows of a prompt that fills some columns; the other columns are padding.

    The last kept row stands last: a prompt that ends in an image would else end in nothing.
    `deep` has (V, D) for each layer.
    """
    begin, end = columns.start, columns.stop
    at_l = np.array(kept_rows, np.int32) + begin
    at_l[-1] = end - 1
    at = mx.array(at_l)
    x_LD = mx.zeros((L, x_lD.shape[1]), x_lD.dtype)
    x_LD[begin:end] = mx.where(mx.arange(x_lD.shape[1]) == 0, mx.nan, mx.inf)
    x_LD[at] = x_lD
    place_3L = visual_L = deep_LYD = None
    if place_3l is not None:
        place_3L = mx.ones((3, L), mx.int32)
        place_3L[:, begin:end] = GONE
        place_3L[:, at] = place_3l.astype(mx.int32)
    if visual_l is not None:
        visual_L = mx.zeros(L, mx.bool_)
        visual_L[at] = visual_l
        deep_LYD = mx.zeros((L, len(deep), x_lD.shape[1]), x_lD.dtype)
        seen = mx.array(at_l[np.array(visual_l)])
        if seen.size:
            deep_LYD[seen] = mx.stack(list(deep), axis=1).astype(x_lD.dtype)
    return Laid(x_LD, place_3L, visual_L, deep_LYD)


def call(stock: Stock, reads_whole: bool, inputs: mx.array, told: dict[str, Any]) -> Any:
    """The language model on the rows that are there; while decoding all are.

    `reads_whole`: is a prompt not to be cut, since its rows see those behind them?
    """
    if told.get("inputs_embeds") is None:
        return stock(inputs, **told)
    x_BnD = told["inputs_embeds"]
    gone_Bn = np.array(mx.isnan(x_BnD[..., 0]) & (x_BnD[..., 1:] == mx.inf).all(axis=-1))
    first = told["cache"][0] if told.get("cache") else None
    if hasattr(first, "left_padding"):
        return _together(stock, reads_whole, inputs, told, gone_Bn)
    if len(gone_Bn) > 1:
        if gone_Bn.any():
            raise UserError("several pruned prompts at once need a cache for a batch")
        return stock(inputs, **_with_deep(told))
    return _alone(stock, inputs, told, gone_Bn[0])


def _alone(stock: Stock, inputs: mx.array, told: dict[str, Any], gone_n: np.ndarray) -> Any:
    """One prompt, or a piece of it; what is told row by row may be of the whole."""
    told = {**told}
    if gone_n.any():
        _check_mask(told)
        left = mx.array(np.flatnonzero(~gone_n).astype(np.int32))
        inputs, told["inputs_embeds"] = inputs[:, left], told["inputs_embeds"][:, left]
    told |= _shorter(told)
    if not told["inputs_embeds"].shape[1]:
        return _nothing(len(inputs))
    return stock(inputs, **_with_deep(told))


def _shorter(told: dict[str, Any]) -> dict[str, Any]:
    """What is told row by row, without the rows that are gone: -1 says which those are."""
    place = told.get("position_ids")
    if place is None or place.ndim != 3 or place.shape[1] != 1:
        return {}
    left = mx.array(np.flatnonzero(np.array(place[0, 0]) != GONE).astype(np.int32))
    cut = {name: told[name][..., left] for name in ALIGNED if told.get(name) is not None}
    if told.get("deepstack_visual_embeds") is not None:
        cut["deepstack_visual_embeds"] = told["deepstack_visual_embeds"][:, left]
    return cut


def _with_deep(told: dict[str, Any]) -> dict[str, Any]:
    """DeepStack's rows (B, l, Y, D) as mlx-vlm reads them: of each layer the visual ones."""
    deep_BlYD, visual_Bl = told.get("deepstack_visual_embeds"), told.get("visual_pos_masks")
    if not isinstance(deep_BlYD, mx.array) or deep_BlYD.ndim != 4 or visual_Bl is None:
        return told
    rows = mx.array(np.flatnonzero(np.array(visual_Bl)).astype(np.int32))
    if not rows.size:
        return {**told, "deepstack_visual_embeds": None, "visual_pos_masks": None}
    deep_VYD = deep_BlYD.flatten(0, 1)[rows]
    return {**told, "deepstack_visual_embeds": [deep_VYD[:, y] for y in range(deep_VYD.shape[1])]}


def _together(
    stock: Stock, reads_whole: bool, inputs: mx.array, told: dict[str, Any], gone_Bn: np.ndarray
) -> Any:
    """A batch from its beginning: each row without what is gone, padded on its left anew."""
    cache, columns = told["cache"], np.arange(gone_Bn.shape[1])
    if cache[0].keys is not None:
        raise UserError("a batch with pruned prompts is read at once, and this one was cut")
    ahead_B = np.array(cache[0].left_padding)
    there = [np.flatnonzero((columns >= a) & ~g) for a, g in zip(ahead_B, gone_Bn, strict=True)]
    longest = max(map(len, there))
    if reads_whole and min(map(len, there)) < longest:
        raise UserError("prompts that see their own end share a batch only when equally long")
    if gone_Bn.any():
        _check_mask(told)
        moved = [longest - len(own) - int(a) for own, a in zip(there, ahead_B, strict=True)]
        for layer in cache:
            layer.prepare(left_padding=moved)
    inputs = _stacked(inputs, there, longest, 0)
    told = told | {"inputs_embeds": _stacked(told["inputs_embeds"], there, longest, 0)}
    for name in (*ALIGNED, "deepstack_visual_embeds"):
        if told.get(name) is not None:
            axis = told[name].ndim == 3 and name == "position_ids"
            told[name] = _stacked(told[name], there, longest, int(axis))
    l = longest  # noqa: E741
    ends = [l] if reads_whole else sorted({*range(PIECE, l - 1, PIECE), l - 1, l} - {0})
    return _in_pieces(stock, ends, inputs, told)


def _stacked(x: mx.array, there: Sequence[np.ndarray], longest: int, axis: int) -> mx.array:
    """The rows that are there of each prompt, zeros ahead; prompts lie along `axis`, rows next."""
    done = []
    for own, x_L in zip(there, mx.split(x, x.shape[axis], axis), strict=True):
        own_l = mx.take(x_L, mx.array(own.astype(np.int32)), axis + 1)
        ahead = [(longest - len(own), 0) if i == axis + 1 else (0, 0) for i in range(x.ndim)]
        done.append(mx.pad(own_l, ahead))
    return mx.concatenate(done, axis)


def _in_pieces(stock: Stock, ends: Sequence[int], inputs: mx.array, told: dict[str, Any]) -> Any:
    """The last row by itself, as mlx-vlm reads it: of a piece the logits are never computed."""
    begin, out = 0, None
    for end in ends:
        piece = told | {"inputs_embeds": told["inputs_embeds"][:, begin:end]}
        for name in ALIGNED:
            if piece.get(name) is not None:
                piece[name] = piece[name][..., begin:end]
        if piece.get("deepstack_visual_embeds") is not None:
            piece["deepstack_visual_embeds"] = piece["deepstack_visual_embeds"][:, begin:end]
        out = stock(inputs[:, begin:end], **_with_deep(piece))
        mx.async_eval([layer.state for layer in told["cache"]])
        begin = end
    return out


def _check_mask(told: dict[str, Any]) -> None:
    if isinstance(told.get("mask"), mx.array):
        raise UserError("a mask of one's own does not fit a pruned prompt: leave it out")


def _nothing(B: int) -> Any:
    """Of a piece of which nothing is left; nobody reads a piece's logits."""
    from mlx_vlm.models.base import LanguageModelOutput

    return LanguageModelOutput(logits=mx.zeros((B, 1, 1)))
