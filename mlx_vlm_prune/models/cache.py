"""Key/value rows of the decoder's layers, each with the position it was made at.

Tokens leave between layers, so layers hold different numbers of rows: a position comes
from the row, never from how many rows there are.

Shapes: B prompts, G key/value heads, L new rows, S rows held, d head size.
"""

import copy
from typing import Protocol

import mlx.core as mx

STEP = 256  # rows are allocated in steps, so that a new token copies nothing
PADDING = -1  # the position of a row that is not there


class NewRows(Protocol):
    """What is noted of rows beside their keys and values."""

    @property
    def positions_BL(self) -> mx.array: ...
    @property
    def padded(self) -> bool: ...
    @property
    def bias_BL(self) -> mx.array | None: ...


class LayerCache:
    """The rows of one layer."""

    def __init__(self) -> None:
        self.keys_BGSd: mx.array | None = None
        self.values_BGSd: mx.array | None = None
        self.positions_BS: mx.array | None = None  # PADDING where there is none
        self.bias_BS: mx.array | None = None  # added to the attention a row gets; mostly nothing
        self.padded = False  # is any row padding?
        self.rows = 0

    def append(
        self, keys_BGLd: mx.array, values_BGLd: mx.array, new: NewRows
    ) -> tuple[mx.array, mx.array]:
        """Add L rows; return the keys and values of all rows held."""
        begin, end = self.rows, self.rows + keys_BGLd.shape[2]
        self.keys_BGSd = _room(self.keys_BGSd, keys_BGLd, begin, end, axis=2)
        self.values_BGSd = _room(self.values_BGSd, values_BGLd, begin, end, axis=2)
        self.positions_BS = _room(self.positions_BS, new.positions_BL, begin, end, axis=1)
        self.keys_BGSd[:, :, begin:end] = keys_BGLd
        self.values_BGSd[:, :, begin:end] = values_BGLd
        self.positions_BS[:, begin:end] = new.positions_BL
        if new.bias_BL is not None or self.bias_BS is not None:
            B, L = new.positions_BL.shape
            held_BS = mx.zeros((B, begin)) if self.bias_BS is None else self.bias_BS
            bias_BL = mx.zeros((B, L)) if new.bias_BL is None else new.bias_BL
            self.bias_BS = mx.concatenate([held_BS, bias_BL], axis=1)
        self.rows, self.padded = end, self.padded or new.padded
        return self.keys, self.values_BGSd[:, :, :end]

    @property
    def keys(self) -> mx.array:
        """(B, G, S, d)."""
        assert self.keys_BGSd is not None, "no row has been read"
        return self.keys_BGSd[:, :, : self.rows]

    @property
    def positions(self) -> mx.array:
        """(B, S)."""
        assert self.positions_BS is not None, "no row has been read"
        return self.positions_BS[:, : self.rows]

    def fork(self) -> "LayerCache":
        """The same rows; what is appended to one of both is not in the other."""
        fork = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, mx.array):
                setattr(fork, name, mx.array(value))
        return fork

    def rewind(self, rows: int) -> None:
        """Forget all but the first `rows`; what is appended next takes the others' places."""
        assert 0 <= rows <= self.rows, f"{self.rows} rows cannot be rewound to {rows}"
        self.rows = rows
        if self.bias_BS is not None:
            self.bias_BS = self.bias_BS[:, :rows]

    @property
    def nbytes(self) -> int:
        """Bytes of the rows held, without the room ahead."""
        if self.keys_BGSd is None or self.values_BGSd is None:
            return 0
        one = self.keys_BGSd[:, :, :1].nbytes + self.values_BGSd[:, :, :1].nbytes
        return one * self.rows


def _room(held: mx.array | None, new: mx.array, begin: int, end: int, axis: int) -> mx.array:
    """Room for `end` rows, the first `begin` filled as before."""
    if held is not None and held.shape[axis] >= end:
        return held
    shape = list(new.shape)
    shape[axis] = -(-end // STEP) * STEP - begin
    fresh = mx.zeros(shape, dtype=new.dtype)
    if held is None or begin == 0:
        return fresh
    old = held[:, :, :begin] if axis == 2 else held[:, :begin]
    return mx.concatenate([old, fresh], axis=axis)
