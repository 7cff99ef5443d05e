"""Key/value rows of the decoder's layers, each with the position it was made at.

Tokens leave between layers, so layers hold different numbers of rows: a position comes
from the row, never from how many rows there are.

Shapes: B prompts, G key/value heads, L new rows, S rows held, d head size.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import mlx.core as mx
import numpy as np

STEP = 256  # rows are allocated in steps, so that a new token copies nothing
PADDING = -1  # the position of a row that is not there


@dataclass(frozen=True, eq=False)
class HeldRows:
    """Which rows a layer holds. It never changes, so layers that read the same rows share one."""

    rows: int = 0
    parts: tuple[mx.array, ...] = ()  # positions (B, L), as the rows were read
    padded: bool = False  # is any row padding?
    bias_BS: mx.array | None = None  # added to the attention a row gets; mostly nothing
    distance_BP: mx.array | None = None  # with biases: added for a row so far before another
    _firsts: "dict[int, HeldRows]" = field(default_factory=dict)

    @cached_property
    def positions_BS(self) -> mx.array:
        """PADDING where there is no row."""
        assert self.parts, "no row has been read"
        return mx.concatenate(list(self.parts), axis=1) if len(self.parts) > 1 else self.parts[0]

    def extended(
        self, positions_BL: mx.array, padded: bool, bias_BL: mx.array | None
    ) -> "HeldRows":
        """With L more rows."""
        (B, L), bias_BS = positions_BL.shape, self.bias_BS
        if bias_BL is not None or bias_BS is not None:
            held_BS = mx.zeros((B, self.rows)) if bias_BS is None else bias_BS
            bias_BL = mx.zeros((B, L)) if bias_BL is None else bias_BL
            bias_BS = mx.concatenate([held_BS, bias_BL], axis=1)
        is_joined = "positions_BS" in vars(self)
        parts = (self.positions_BS,) if is_joined else self.parts
        parts, padded = (*parts, positions_BL), self.padded or padded
        return HeldRows(self.rows + L, parts, padded, bias_BS, self.distance_BP)

    def unbiased(self) -> "HeldRows":
        """The same rows, to whose attention nothing is added."""
        return HeldRows(self.rows, self.parts, self.padded)

    def first(self, rows: int) -> "HeldRows":
        """The first `rows` of them."""
        if rows not in self._firsts:
            parts, left = list[mx.array](), rows
            for part in self.parts:
                parts += [part[:, :left]] if left else []
                left -= min(left, part.shape[1])
            bias_BS = None if self.bias_BS is None else self.bias_BS[:, :rows]
            self._firsts[rows] = HeldRows(
                rows, tuple(parts), self.padded, bias_BS, self.distance_BP
            )
        return self._firsts[rows]

    @classmethod
    def joined(cls, parts: "Sequence[HeldRows]") -> "HeldRows":
        """The rows of several prompts as one batch, padded on the left to the most rows."""
        assert all(part.distance_BP is None for part in parts), "prompts are read before"
        S = max(part.rows for part in parts)

        def padded(x_BS: mx.array, value: int = 0) -> mx.array:
            return mx.pad(x_BS, [(0, 0), (S - x_BS.shape[1], 0)], constant_values=value)

        positions_BS = mx.concatenate([padded(part.positions_BS, PADDING) for part in parts])
        bias_BS = None
        if any(part.bias_BS is not None for part in parts):
            biases = [
                mx.zeros(part.positions_BS.shape) if part.bias_BS is None else part.bias_BS
                for part in parts
            ]
            bias_BS = mx.concatenate([padded(bias_BS) for bias_BS in biases])
        is_padded = any(part.padded or part.rows < S for part in parts)
        return cls(S, (positions_BS,), is_padded, bias_BS)

    def of_prompts(self, prompts: Sequence[int]) -> "HeldRows":
        """The rows of some prompts, without what is padding in all of them."""
        index = mx.array(list(prompts))
        positions_BS = self.positions_BS[index]
        is_padding_BS = np.array(positions_BS == PADDING)
        begin = int(is_padding_BS.all(axis=0).argmin()) if self.padded else 0
        bias_BS = None if self.bias_BS is None else self.bias_BS[index, begin:]
        if bias_BS is not None and not mx.any(bias_BS).item():  # those that had one have left
            bias_BS = None
        is_padded = self.padded and bool(is_padding_BS[:, begin:].any())
        return HeldRows(self.rows - begin, (positions_BS[:, begin:],), is_padded, bias_BS)


NO_ROWS = HeldRows()


class NewRows(Protocol):
    """Rows that some layers read in one forward pass."""

    def rows_after(self, held: HeldRows) -> HeldRows:
        """What a layer holds when it has read them; the same object for the same `held`."""
        ...


class LayerCache:
    """The keys and values of one layer's rows."""

    def __init__(self) -> None:
        self.keys_BGSd: mx.array | None = None  # with room ahead, as the values
        self.values_BGSd: mx.array | None = None
        self.held = NO_ROWS

    def append(
        self, keys_BGLd: mx.array, values_BGLd: mx.array, new: NewRows
    ) -> tuple[mx.array, mx.array]:
        """Add L rows; return the keys and values of all rows held."""
        begin, self.held = self.rows, new.rows_after(self.held)
        end = self.rows
        self.keys_BGSd = _room(self.keys_BGSd, keys_BGLd, begin, end)
        self.values_BGSd = _room(self.values_BGSd, values_BGLd, begin, end)
        self.keys_BGSd[:, :, begin:end] = keys_BGLd
        self.values_BGSd[:, :, begin:end] = values_BGLd
        return self.keys, self.values

    @property
    def rows(self) -> int:
        """How many it holds."""
        return self.held.rows

    @property
    def keys(self) -> mx.array:
        """(B, G, S, d)."""
        assert self.keys_BGSd is not None, "no row has been read"
        return self.keys_BGSd[:, :, : self.rows]

    @property
    def values(self) -> mx.array:
        """(B, G, S, d)."""
        assert self.values_BGSd is not None, "no row has been read"
        return self.values_BGSd[:, :, : self.rows]

    @property
    def positions_BS(self) -> mx.array:
        """PADDING where there is no row."""
        return self.held.positions_BS

    @property
    def bias_BS(self) -> mx.array | None:
        """Added to the attention a row gets."""
        return self.held.bias_BS

    def fork(self) -> "LayerCache":
        """The same rows; what is appended to one of both is not in the other."""
        fork = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, mx.array):
                setattr(fork, name, mx.array(value))
        return fork

    @classmethod
    def joined(
        cls, caches: "Sequence[LayerCache]", shared: dict[tuple[int, ...], HeldRows]
    ) -> "LayerCache":
        """A layer's rows of several prompts as one batch, padded on the left to the most rows.

        `shared` has the rows of layers that were joined before, which then are the same object.
        """
        S = max(cache.rows for cache in caches)
        key = tuple(id(cache.held) for cache in caches)
        if key not in shared:
            shared[key] = HeldRows.joined([cache.held for cache in caches])
        joined = cls()
        joined.held = shared[key]
        joined.keys_BGSd = mx.concatenate([_behind_zeros(c.keys, S) for c in caches])
        joined.values_BGSd = mx.concatenate([_behind_zeros(c.values, S) for c in caches])
        return joined

    def of_prompts(
        self, prompts: Sequence[int], shared: dict[tuple[int, ...], HeldRows]
    ) -> "LayerCache":
        """The rows of some prompts of a batch, without what is padding in all of them."""
        key = (id(self.held),)
        if key not in shared:
            shared[key] = self.held.of_prompts(prompts)
        part, index = LayerCache(), mx.array(list(prompts))
        part.held, begin = shared[key], self.rows - shared[key].rows
        part.keys_BGSd = mx.contiguous(self.keys[index, :, begin:])
        part.values_BGSd = mx.contiguous(self.values[index, :, begin:])
        return part

    def rewind(self, rows: int) -> None:
        """Forget all but the first `rows`; what is appended next takes the others' places."""
        assert 0 <= rows <= self.rows, f"{self.rows} rows cannot be rewound to {rows}"
        self.held = self.held.first(rows)

    @property
    def arrays(self) -> list[mx.array]:
        """All that is held, to evaluate together."""
        arrays = (self.keys_BGSd, self.values_BGSd, *self.held.parts, self.held.bias_BS)
        return [array for array in arrays if array is not None]

    @property
    def nbytes(self) -> int:
        """Bytes of the rows held, without the room ahead."""
        if self.keys_BGSd is None or self.values_BGSd is None:
            return 0
        one = self.keys_BGSd[:, :, :1].nbytes + self.values_BGSd[:, :, :1].nbytes
        return one * self.rows


def _behind_zeros(x_BGSd: mx.array, S: int) -> mx.array:
    """(B, G, S, d)."""
    return mx.pad(x_BGSd, [(0, 0), (0, 0), (S - x_BGSd.shape[2], 0), (0, 0)])


def _room(held: mx.array | None, new: mx.array, begin: int, end: int) -> mx.array:
    """Room for `end` rows (B, G, S, d), the first `begin` filled as before."""
    if held is not None and held.shape[2] >= end:
        return held
    B, G, _, d = new.shape
    fresh = mx.zeros((B, G, -(-end // STEP) * STEP - begin, d), dtype=new.dtype)
    if held is None or begin == 0:
        return fresh
    return mx.concatenate([held[:, :, :begin], fresh], axis=2)
