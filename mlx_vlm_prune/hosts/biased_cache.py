"""Caches of mlx-vlm's that add to the attention which kept rows get, for `restore`.

mlx-vlm's language models ask a layer's cache for the mask of all layers, once a call. A cache
behind `BiasedCache` answers with an additive mask. It holds the rows' biases in a second cache of
mlx-vlm's own kind, which is filtered, extended and trimmed with the first.

Shapes: B prompts, N rows of a call, S rows held.
"""

import copy
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np

from ..checkpoints.errors import UserError

ROUNDING = 0.02  # of a factor, by which the log of a whole number in bfloat16 may miss it


class BiasedCache:
    """Mixin before a cache's class; without biases the mask is the class's own."""

    preserve_auxiliary_kv_state = True  # mlx-vlm replaces no such cache by one of fractional bits
    biases: Any = None  # a cache whose keys are the biases (B, 1, S, 1)
    coming_BN: mx.array | None = None  # biases of the rows to be read next; of later ones 0

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        stock: Any = super()
        biased = self.biases is not None
        mask = stock.make_mask(N, return_array=return_array or biased, window_size=window_size)
        if not biased:
            return mask
        bias_B11S = self._hold_next(N).swapaxes(2, 3)
        if mask is None:
            return bias_B11S
        # Half the least number: a row of padding, from which all others are hidden, is no NaN.
        hidden = mx.array(mx.finfo(bias_B11S.dtype).min / 2, bias_B11S.dtype)
        return mx.where(mask, bias_B11S, hidden)

    def _hold_next(self, N: int) -> mx.array:
        """The biases of all rows, with those of the next N, (B, 1, S, 1)."""
        held, coming_BN = self.biases, self.coming_BN
        if coming_BN is None:
            next_BN = mx.zeros((len(held.keys), N), held.keys.dtype)
        else:
            next_BN = coming_BN[:, :N]
            next_BN = mx.pad(next_BN, [(0, 0), (0, N - next_BN.shape[1])])
            self.coming_BN = coming_BN[:, N:] if coming_BN.shape[1] > N else None
        next_B1N1 = next_BN[:, None, :, None]
        return held.update_and_fetch(next_B1N1, next_B1N1)[0]


def add_biases(caches: list[Any], layers: Sequence[int], bias_BN: mx.array | None) -> None:
    """Let the next N rows get more attention, by the caches of the layers that make masks."""
    for layer in layers:
        layer_cache: Any = caches[layer]
        if not isinstance(layer_cache, BiasedCache):
            layer_cache.__class__ = biased_class(layer_cache.__class__)
        if bias_BN is not None:
            layer_cache.biases = layer_cache.biases or _no_biases(layer_cache, bias_BN.dtype)
            layer_cache.coming_BN = bias_BN


def with_repeated_rows(layer_cache: Any) -> Any:
    """A cache of one prompt in which a row stands as often as its bias is the log of: attention is
    the same without a mask. One without biases is itself. Reads the biases on the host. Raises
    UserError where that is no whole number."""
    biases = getattr(layer_cache, "biases", None)
    if biases is None:
        return layer_cache
    keys, values = layer_cache.state
    factor_S = np.exp(np.array(biases.state[0][0, 0, :, 0].astype(mx.float32)))
    times_S = np.rint(factor_S)
    uneven_S = np.abs(factor_S - times_S) > ROUNDING * factor_S
    if uneven_S.any():
        raise UserError(
            f"a method raises attention {factor_S[uneven_S][0]:.3g} times; between the layers of a"
            " model of mlx-vlm's it must be a whole number of times"
        )
    rows = mx.array(np.repeat(np.arange(len(times_S)), times_S.astype(int)))
    kind: Any = next(c for c in type(layer_cache).__mro__ if not issubclass(c, BiasedCache))
    repeated = kind()
    repeated.update_and_fetch(keys[..., rows, :], values[..., rows, :])
    return repeated


@cache
def biased_class(base: Any) -> type:
    """A cache's class behind the mixin, which does with biases what mlx-vlm does with rows."""

    def trim(self: Any, n: int) -> int:
        if self.biases is not None:
            self.biases.trim(n)
        trimmed: int = base.trim(self, n)
        return trimmed

    def filter(self: Any, prompts: mx.array) -> None:
        if self.biases is not None:
            self.biases.filter(prompts)
        base.filter(self, prompts)

    def extend(self: Any, other: Any) -> None:
        if both := _all_biases([self, other]):
            self.biases = both[0]
            self.biases.extend(both[1])
        base.extend(self, other)

    def to_quantized(self: Any, **options: Any) -> Any:
        return _with_biases(base.to_quantized(self, **options), self.biases, self.coming_BN)

    def merge(caches: Sequence[Any]) -> Any:
        rows = _all_biases(caches)
        return _with_biases(base.merge(caches), type(rows[0]).merge(rows) if rows else None, None)

    methods: list[Callable[..., Any]] = [trim, filter, extend, to_quantized]
    attributes: dict[str, Any] = {f.__name__: f for f in methods if hasattr(base, f.__name__)}
    if hasattr(base, "merge"):
        attributes["merge"] = staticmethod(merge)
    return type(base.__name__, (BiasedCache, base), attributes)


def _all_biases(caches: Sequence[Any]) -> list[Any]:
    """The biases of each cache; nothing where none has any."""
    all_biases = [getattr(cache, "biases", None) for cache in caches]
    dtypes = [biases.keys.dtype for biases in all_biases if biases is not None]
    return [
        _no_biases(cache, dtypes[0]) if biases is None else biases
        for cache, biases in zip(caches, all_biases, strict=True)
        if dtypes
    ]


def _with_biases(cache: Any, biases: Any, coming_BN: mx.array | None) -> Any:
    cache.__class__ = biased_class(cache.__class__)
    cache.biases, cache.coming_BN = biases, coming_BN
    return cache


def _no_biases(cache: Any, dtype: mx.Dtype) -> Any:
    """Biases of 0 for the rows that a cache holds: the cache itself, with one feature."""
    from mlx_vlm.models.cache import BatchKVCache, KVCache

    is_batch = hasattr(cache, "left_padding")
    biases = copy.copy(cache)
    biases.__class__ = next(c for c in type(cache).__mro__ if not issubclass(c, BiasedCache))
    if hasattr(cache, "bits"):
        biases.__class__ = BatchKVCache if is_batch else KVCache
    for name in ("offset", "left_padding"):  # += changes an array in place
        if isinstance(value := getattr(cache, name, None), mx.array):
            setattr(biases, name, mx.array(value))
    if cache.keys is not None:
        B = len(cache.left_padding) if is_batch else 1
        held = cache._idx if is_batch else cache.offset
        S = cache.keys.shape[-2] if isinstance(cache.keys, mx.array) else held
        biases.keys = biases.values = mx.zeros((B, 1, S, 1), dtype)
    return biases
