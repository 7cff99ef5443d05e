"""Is what a method returned a choice of K slots? A method of one's own may return anything.

Shapes: B images, N visual tokens, K kept.
"""

from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import mlx.core as mx
import numpy as np

from ..checkpoints.errors import UserError
from .contract import Reduction, Signals

_read_once: WeakSet[Callable[..., Any]] = WeakSet()  # whose indices were right the first time


def check_reduction(
    name: str,
    method: Callable[..., Any],
    kept: Any,
    signals: Signals,
    K: int,
    is_finite: mx.array,
) -> Reduction:
    """What a method, a function that is called `name`, returned.

    Raises UserError unless its shapes and dtypes are those of K slots, and unless its indices
    ascend. These are read the first time only, since a GPU has to be waited for, and not of
    features that are no finite numbers, which are no fault of the method's.
    """
    _check_shapes(name, kept, signals, K)
    if kept.index_BK is not None and method not in _read_once:
        try:
            index_BK, can_tell = np.array(kept.index_BK).astype(int), bool(is_finite)
        except ValueError:  # inside a transformation of MLX, which only traces
            return kept
        if can_tell:
            _check_indices(name, index_BK, signals.x_BND.shape[1])
            _read_once.add(method)
    checked: Reduction = kept
    return checked


def _check_shapes(name: str, kept: Any, signals: Signals, K: int) -> None:
    if not isinstance(kept, Reduction):
        raise UserError(f"{name} returned {type(kept).__name__}; it must be a Reduction")
    if kept.index_BK is None and kept.weight_BKN is None:
        raise UserError(f"{name} returned a Reduction without index_BK and weight_BKN")
    if (kept.slot_BN is None) != (kept.share_BN is None):
        raise UserError(f"{name} returned a Reduction with only one of slot_BN and share_BN")
    B, N, _ = signals.x_BND.shape
    shapes = {"index_BK": (B, K), "weight_BKN": (B, K, N), "value_BND": (B, N)}
    shapes |= {"slot_BN": (B, N), "share_BN": (B, N), "score_BN": (B, N)}
    for part, shape in shapes.items():
        array = getattr(kept, part)
        if array is None:
            continue
        if not isinstance(array, mx.array):
            raise UserError(f"{name} returned {part} as {type(array).__name__}, not as mx.array")
        if array.shape[: len(shape)] != shape or array.ndim != len(part.rpartition("_")[2]):
            raise UserError(f"{name} returned {part} of shape {array.shape}; it must be {shape}")
    if kept.index_BK is not None and not mx.issubdtype(kept.index_BK.dtype, mx.integer):
        raise UserError(f"{name} returned index_BK of {kept.index_BK.dtype}; give whole numbers")


def _check_indices(name: str, index_BK: np.ndarray, N: int) -> None:
    if not ((index_BK >= 0) & (index_BK < N)).all():
        raise UserError(f"{name} returned an index outside the {N} tokens: give 0 to {N - 1}")
    if not (np.diff(index_BK) > 0).all():
        raise UserError(
            f"{name} returned indices that do not ascend, or one twice; sort them, as keep_highest"
            " of mlx_vlm_prune.pruners.numerics does"
        )
