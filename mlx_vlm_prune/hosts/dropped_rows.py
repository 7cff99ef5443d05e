"""Dropped rows: marked in a prompt of full length, and left out where the model is called.

mlx-vlm's tools cut, pad and batch a prompt by the number of its ids, so a pruned prompt keeps its
full length. The embedding of a dropped row is NaN and infinities, and its position is -1. Dropped
rows are left out when the language model is called. A tool that forgets to leave them out gets
NaN, never a wrong answer. The NaN of a broken model differs: its first feature may be NaN, but the
others are not all infinite.

How many rows of an image are dropped is known before the choice, so which columns are empty is,
too: kept rows stand in their order, but not each at the column of its own id. `attention_mask`
says so on the host, and mlx-vlm's tools cut and pad it as they do embeddings. Embeddings are read
on the host only where a tool leaves it out.

With an enhancer `attention_mask` has for each row how many tokens it stands for in later attention,
whose log is its bias: 1 for a word, 0 where a row is dropped. It is read behind the choice, then.

Shapes: B prompts, L rows with the dropped ones, l kept rows, n rows of a piece, D features,
Y layers that DeepStack adds to, V visual rows kept.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np

from ..checkpoints.errors import UserError
from ..models.layers import PREFILL_STEP_SIZE
from .biased_cache import add_biases

DROPPED = -1  # the position of a dropped row
EMBEDDINGS, POSITIONS = "inputs_embeds", "position_ids"
IS_VISUAL, DEEPSTACK = "visual_pos_masks", "deepstack_visual_embeds"
PER_LAYER = "per_layer_inputs"  # Gemma 4's: a second embedding of a row for each layer
MEDIA = "mm_token_type_ids"  # Gemma 4's: which rows are of an image, and see one another
BIAS = "bias"  # added to the attention that rows get; an argument from here to `_with_biases`
# What has an entry a row beside embeddings, in mlx-vlm's features and in calls; of some of it rows
# are the second axis.
PER_ROW = (POSITIONS, IS_VISUAL, DEEPSTACK, PER_LAYER)
PER_ROW_IN_CALLS = (*PER_ROW, MEDIA)
ROWS_SECOND = (EMBEDDINGS, DEEPSTACK, PER_LAYER)
IS_READ = "attention_mask"  # 0 where a row is dropped; never on a graph with the model's weights
Language = Callable[..., Any]  # the call of mlx-vlm's own language model


def to_full_length(
    L: int, columns: range, kept_columns: Sequence[int], features: Any, Y: int
) -> dict[str, mx.array]:
    """mlx-vlm's features of a prompt's kept rows, at full length and with marked dropped rows.

    Embeddings are (L, D), which rows are read (L,), or how many tokens each stands for; where a
    family has them positions (3, L), visual rows (L,), DeepStack's (L, Y, D), and what each layer
    takes in beside (L, layers, d). The prompt stands in `columns`, the other columns are padding.
    The last kept row takes the last column, so that a prompt that ends in an image still ends in a
    real row.
    """
    begin, end = columns.start, columns.stop
    column_l = np.array(kept_columns, np.int32) + begin
    column_l[-1] = end - 1
    is_read_L = np.ones(L, np.int32)
    is_read_L[begin:end] = np.isin(np.arange(begin, end), column_l)
    kept_l, x_lD = mx.array(column_l), features.inputs_embeds[0]
    l, D = x_lD.shape  # noqa: E741
    x_LD = mx.zeros((L, D), x_lD.dtype)
    x_LD[begin:end] = mx.where(mx.arange(D) == 0, mx.nan, mx.inf)
    x_LD[kept_l] = x_lD
    full = {EMBEDDINGS: x_LD, IS_READ: mx.array(is_read_L)}
    if features.attention_mask is not None:
        full[IS_READ] = full[IS_READ].astype(mx.float32)
        full[IS_READ][kept_l] = features.attention_mask[0]
    if features.position_ids is not None:
        positions_3L = mx.ones((3, L), mx.int32)
        positions_3L[:, begin:end] = DROPPED
        positions_3l = mx.broadcast_to(features.position_ids.reshape(-1, l), (3, l))
        positions_3L[:, kept_l] = positions_3l.astype(mx.int32)
        full[POSITIONS] = positions_3L
    if Y:
        is_visual_L = mx.zeros(L, mx.bool_)
        if features.visual_pos_masks is not None:
            is_visual_L[kept_l] = features.visual_pos_masks[0]
        full[IS_VISUAL] = is_visual_L
        full[DEEPSTACK] = deepstack_rows(is_visual_L, features.deepstack_visual_embeds, Y, x_lD)
    if features.per_layer_inputs is not None:
        full[PER_LAYER] = _per_layer_rows(L, columns, kept_l, features.per_layer_inputs[0])
    return full


def _per_layer_rows(L: int, columns: range, kept_l: mx.array, per_layer: mx.array) -> mx.array:
    """What each layer takes in, (l, layers, d) of kept rows, as (L, layers, d) with NaN for dropped
    ones."""
    full = mx.zeros((L, *per_layer.shape[1:]), per_layer.dtype)
    full[columns.start : columns.stop] = mx.nan
    full[kept_l] = per_layer
    return full


def deepstack_rows(
    is_visual_L: mx.array, deepstack: Sequence[mx.array] | None, Y: int, like: mx.array
) -> mx.array:
    """What DeepStack adds to every row, (L, Y, D): zeros for words.

    `deepstack` has (V, D) for each of Y layers; width and dtype are those of `like`.
    """
    deep_LYD = mx.zeros((len(is_visual_L), Y, like.shape[-1]), like.dtype)
    if not deepstack or not len(deepstack[0]):
        return deep_LYD
    deep_VYD = mx.stack(list(deepstack), axis=1).astype(like.dtype)
    place_L = mx.maximum(mx.cumsum(is_visual_L.astype(mx.int32)) - 1, 0)
    return mx.where(is_visual_L[:, None, None], deep_VYD[place_L], deep_LYD)


@dataclass
class ReadColumns:
    """How many columns of a prompt its language model has read, for tools that cut embeddings and
    leave `attention_mask` as it was; and what the prompt left on the model."""

    mask: Callable[[], mx.array | None]  # a weak reference
    mask_layers: Sequence[int] = ()  # with an enhancer: those whose caches make masks
    columns: int = 0
    request_state: dict[str, Any] = field(default_factory=dict)

    def next_rows(self, x_BnD: mx.array, is_read_BL: mx.array | None) -> np.ndarray | None:
        """`attention_mask` of the next n rows, (B, n); None where the two do not fit."""
        if is_read_BL is None:
            return None
        B, n = x_BnD.shape[:2]
        if is_read_BL.shape == (B, n):
            return np.array(is_read_BL)
        begin, self.columns = self.columns, self.columns + n
        if len(is_read_BL) != B or self.columns > is_read_BL.shape[1]:
            return None
        return np.array(is_read_BL[:, begin : self.columns])


def call_on_kept_rows(
    language: Language, is_bidirectional: bool, ids_BL: mx.array, arguments: dict[str, Any],
    read: ReadColumns,
) -> Any:  # fmt: skip
    """Call the language model without the dropped rows. While decoding there are none.

    A model that is bidirectional in its prompt gets a batch in one call.
    Raises UserError for a cache or a mask that does not fit pruned prompts, and where rows are to
    get more attention without a cache or `attention_mask`.
    """
    arguments = {**arguments}
    x_BLD, is_read_BL = arguments.get(EMBEDDINGS), arguments.pop(IS_READ, None)
    cache: Any = arguments.get("cache")
    if cache:  # also of a prompt of words: its batch may be joined by others
        add_biases(cache, read.mask_layers, None)
    has_batch_cache = bool(cache) and hasattr(rows_cache(cache), "left_padding")
    if x_BLD is None:
        more = _padding_mask(cache, ids_BL) if is_bidirectional and has_batch_cache else {}
        return language(ids_BL, **(arguments | more))
    weight_BL = read.next_rows(x_BLD, is_read_BL)
    if weight_BL is not None:
        is_dropped_BL = weight_BL == 0
    else:
        is_dropped_BL = np.array(mx.isnan(x_BLD[..., 0]) & (x_BLD[..., 1:] == mx.inf).all(axis=-1))
    if read.mask_layers:
        bias_BL = _biases(weight_BL if cache else None)
        if bias_BL is not None:
            arguments[BIAS] = bias_BL.astype(x_BLD.dtype)
            language = _with_biases(language, read.mask_layers)
    if is_dropped_BL.any():
        if len(is_dropped_BL) > 1 and not has_batch_cache:
            raise UserError("several pruned prompts at once need a cache for a batch")
        if isinstance(arguments.get("mask"), mx.array):
            raise UserError("a mask of one's own does not fit a pruned prompt: leave it out")
    if has_batch_cache:
        return _call_on_batch(language, is_bidirectional, ids_BL, arguments, is_dropped_BL)
    if len(is_dropped_BL) > 1:
        return _call(language, ids_BL, arguments)
    return _call_on_prompt(language, ids_BL, arguments, is_dropped_BL[0], is_read_BL)


def _padding_mask(cache: Any, ids_BL: mx.array) -> dict[str, mx.array]:
    """PaliGemma makes no mask, and would attend to the padding of shorter prompts."""
    is_one_kind = len({*map(type, cache)}) == 1
    return {"mask": cache[0].make_mask(ids_BL.shape[1], return_array=True)} if is_one_kind else {}


def _call_on_prompt(
    language: Language, ids_1n: mx.array, arguments: dict[str, Any], is_dropped_n: np.ndarray,
    is_read_1L: mx.array | None,
) -> Any:  # fmt: skip
    """A prompt, or a piece of it. What has an entry a row beside embeddings may still be the whole
    prompt's."""
    if is_dropped_n.any():
        kept = _true_rows(~is_dropped_n)
        of_piece = _at_rows(arguments, [EMBEDDINGS, BIAS], kept)
        ids_1n, arguments = ids_1n[:, kept], arguments | of_piece
    is_kept = _kept_of_whole(arguments, is_dropped_n, is_read_1L)
    if is_kept is not None and not is_kept.all():
        names = [name for name in PER_ROW_IN_CALLS if _rows_of(arguments, name) == len(is_kept)]
        arguments = arguments | _at_rows(arguments, names, _true_rows(is_kept))
    if arguments[EMBEDDINGS].shape[1]:  # ids may be fewer, where one stands for an image
        return _call(language, ids_1n, arguments)
    from mlx_vlm.models.base import LanguageModelOutput

    return LanguageModelOutput(logits=mx.zeros((1, 1, 1)))  # of a piece, whose logits are not read


def _kept_of_whole(
    arguments: dict[str, Any], is_dropped_n: np.ndarray, is_read_1L: mx.array | None
) -> np.ndarray | None:
    """Which rows stay of what has an entry a row, the prompt's or a piece's; None without any.
    Where no mask says it, positions and what each layer takes in have their own marks."""
    positions, per_layer = arguments.get(POSITIONS), arguments.get(PER_LAYER)
    has_marks = positions is not None and positions.ndim == 3 and positions.shape[1] == 1
    rows = _rows_of(arguments, POSITIONS) if has_marks else 0
    rows = rows or _rows_of(arguments, PER_LAYER) or _rows_of(arguments, MEDIA)
    if is_read_1L is not None and rows == is_read_1L.shape[1]:
        return np.array(is_read_1L)[0] != 0
    if has_marks and positions is not None:
        return np.array(positions[0, 0] != DROPPED)
    if per_layer is not None:
        return np.array(~mx.isnan(per_layer[0, :, 0, 0]))
    return ~is_dropped_n if rows == len(is_dropped_n) else None


def _call_on_batch(
    language: Language, is_bidirectional: bool, ids_BL: mx.array, arguments: dict[str, Any],
    is_dropped_BL: np.ndarray,
) -> Any:  # fmt: skip
    """Whole prompts of a batch, padded on the left again to the most kept rows."""
    cache = arguments["cache"]
    if rows_cache(cache).keys is not None:
        raise UserError("a batch with pruned prompts is read at once, and this one was cut")
    padding_B = np.array(rows_cache(cache).left_padding)
    is_kept_BL = ~is_dropped_BL & (np.arange(is_dropped_BL.shape[1]) >= padding_B[:, None])
    kept = [np.flatnonzero(is_kept_L).astype(np.int32) for is_kept_L in is_kept_BL]
    l = max(map(len, kept))  # noqa: E741
    if is_bidirectional and min(map(len, kept)) < l:
        raise UserError("prompts that see their own end share a batch only when equally long")
    if is_dropped_BL.any():
        more_padding = [l - len(rows) - int(n) for rows, n in zip(kept, padding_B, strict=True)]
        for layer_cache in cache:
            if holds_rows(layer_cache):
                layer_cache.prepare(left_padding=more_padding)
            else:
                layer_cache.left_padding = layer_cache.left_padding + mx.array(more_padding)
    arguments = {**arguments}
    if len(kept) != len(arguments.get(MEDIA, kept)):  # mlx-vlm joins those of some prompts only
        if is_bidirectional:
            raise UserError(f"a batch needs the {MEDIA} of every prompt")
        del arguments[MEDIA]
    for name in (EMBEDDINGS, BIAS, *PER_ROW_IN_CALLS):
        if (x := arguments.get(name)) is not None:
            prompt_axis = 1 if name == POSITIONS and x.ndim == 3 else 0
            arguments[name] = _pad_left(x, kept, l, prompt_axis)
    step = None if is_bidirectional else PREFILL_STEP_SIZE
    return _call_in_steps(language, _pad_left(ids_BL, kept, l, 0), arguments, step)


def _pad_left(x: mx.array, kept: Sequence[np.ndarray], l: int, prompt_axis: int) -> mx.array:  # noqa: E741
    """The kept rows of each prompt behind zeros, l together; rows follow the axis of prompts. Ids
    may be fewer than rows, where one stands for an image: as many are taken as there are."""
    row_axis, padded = prompt_axis + 1, []
    for rows, x_1L in zip(kept, mx.split(x, x.shape[prompt_axis], prompt_axis), strict=True):
        rows, widths = rows[rows < x_1L.shape[row_axis]], [(0, 0)] * x.ndim
        widths[row_axis] = (l - len(rows), 0)
        padded.append(mx.pad(mx.take(x_1L, mx.array(rows), row_axis), widths))
    return mx.concatenate(padded, prompt_axis)


def _call_in_steps(
    language: Language, ids_Bl: mx.array, arguments: dict[str, Any], step: int | None
) -> Any:
    """Up to `step` rows a call, or all in one call without it. With steps the last row comes alone,
    as in mlx-vlm, so that no logits of other rows are computed."""
    l, output = ids_Bl.shape[1], None  # noqa: E741
    ends = [l] if step is None else sorted({*range(step, l - 1, step), l - 1, l} - {0})
    for begin, end in pairwise([0, *ends]):
        rows = slice(begin, end)
        piece = arguments | _at_rows(arguments, (EMBEDDINGS, BIAS, *PER_ROW_IN_CALLS), rows)
        output = _call(language, ids_Bl[:, rows], piece)
        mx.async_eval([layer_cache.state for layer_cache in arguments["cache"]])
    return output


def _call(language: Language, ids_Bl: mx.array, arguments: dict[str, Any]) -> Any:
    """The language model's own call. DeepStack's rows (B, l, Y, D) become what mlx-vlm takes: of
    each layer the visual rows only (V, D)."""
    deep_BlYD, is_visual_Bl = arguments.get(DEEPSTACK), arguments.get(IS_VISUAL)
    if isinstance(deep_BlYD, mx.array) and deep_BlYD.ndim == 4 and is_visual_Bl is not None:
        rows = _true_rows(is_visual_Bl)
        deepstack = list(deep_BlYD.flatten(0, 1)[rows].swapaxes(0, 1)) if rows.size else None
        is_visual_Bl = is_visual_Bl if rows.size else None
        arguments = arguments | {DEEPSTACK: deepstack, IS_VISUAL: is_visual_Bl}
    return language(ids_Bl, **arguments)


def _biases(weight_BL: np.ndarray | None) -> mx.array | None:
    """What is added to the attention that rows get, by `attention_mask`; None where nothing is.

    Raises UserError without either mask or cache, when the answer would lack it.
    """
    if weight_BL is None:
        raise UserError(
            "rows of a pruned prompt get more attention here: call the language model with a cache,"
            " and with the attention_mask that get_input_embeddings gave"
        )
    if np.isin(weight_BL, (0, 1)).all():
        return None
    return mx.array(np.log(np.where(weight_BL == 0, 1, weight_BL)))


def _with_biases(language: Language, mask_layers: Sequence[int]) -> Language:
    """The language model's call, before which the caches hear what is added to its rows."""

    def call(ids_Bl: mx.array, **arguments: Any) -> Any:
        add_biases(arguments["cache"], mask_layers, arguments.pop(BIAS))
        return language(ids_Bl, **arguments)

    return call


def holds_rows(layer_cache: Any) -> bool:
    """Does a layer's cache hold rows? A recurrent layer's holds a state instead."""
    return hasattr(layer_cache, "offset")


def rows_cache(caches: Sequence[Any]) -> Any:
    """The first layer's cache that holds rows."""
    return next(filter(holds_rows, caches), caches[0])


def _at_rows(
    arguments: dict[str, Any], names: Iterable[str], rows: slice | mx.array
) -> dict[str, Any]:
    """Those of the named arguments that are given, at some rows."""
    given = {name: arguments[name] for name in names if arguments.get(name) is not None}
    return {name: x[:, rows] if name in ROWS_SECOND else x[..., rows] for name, x in given.items()}


def _rows_of(arguments: dict[str, Any], name: str) -> int:
    """How many rows a named argument has an entry for; 0 where it is not given."""
    x = arguments.get(name)
    if not isinstance(x, mx.array):
        return 0
    return x.shape[1] if name in ROWS_SECOND else x.shape[-1]


def _true_rows(is_true: Any) -> mx.array:
    """Indices of the true entries, of several axes as if they were one."""
    return mx.array(np.flatnonzero(np.array(is_true)).astype(np.int32))
