"""Rows of a large matrix, such as the similarities of every two tokens, as they are needed.

Shapes: B images, N tokens, n of them, M entries of a row, D features.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import mlx.core as mx

from .contract import take
from .numerics import choice_dtype, rounded_cosine, unit

if TYPE_CHECKING:
    from .lazy import HeldRows

MOST_HELD = 8192  # rows of a matrix that is held: 0.5 GB in float64
BLOCK = 128  # rows at a time; MLX allocates about ten results ahead
NOBODY = -2.0  # below every cosine


def block_size(N: int) -> int:
    """How many of N rows to work on at a time: on a GPU, where a launch costs more than memory,
    all, where they may be held."""
    return N if choice_dtype() == mx.float32 and N <= MOST_HELD else BLOCK


class Rows:
    """A matrix with a row for each of N tokens: all rows are computed at once and held, or, of more
    than `MOST_HELD`, each whenever it is read.

    `rows_of(*parts)` computes the rows (B, n, M) of n tokens from their `parts` (B, n, ...).
    """

    def __init__(
        self, rows_of: Callable[..., mx.array], *parts_BN: mx.array, hold: bool = True
    ) -> None:
        self.rows_of, self.N = rows_of, parts_BN[0].shape[1]
        self.all_BNM = rows_of(*parts_BN) if hold and self.N <= MOST_HELD else None
        self.parts_BN = parts_BN if self.all_BNM is None else ()

    def then(self, change: Callable[..., mx.array], *parts_BN: mx.array) -> "Rows":
        """The rows `change(rows, *parts)`, with further parts of each token."""
        if self.all_BNM is not None:
            return Rows(change, self.all_BNM, *parts_BN)
        rows_of, count = self.rows_of, len(self.parts_BN)

        def changed(*all_parts: mx.array) -> mx.array:
            return change(rows_of(*all_parts[:count]), *all_parts[count:])

        return Rows(changed, *self.parts_BN, *parts_BN, hold=False)

    def take(self, index_Bn: mx.array) -> mx.array:
        """The rows of some tokens, (B, n, M)."""
        if self.all_BNM is not None:
            return take(self.all_BNM, index_Bn)
        return self.rows_of(*(take(part_BN, index_Bn) for part_BN in self.parts_BN))

    def blocks(self) -> Iterator[mx.array]:
        """All rows in order, (B, n, M) at a time."""
        size = block_size(self.N)
        for first in range(0, self.N, size):
            some = slice(first, first + size)
            if self.all_BNM is not None:
                yield self.all_BNM[:, some]
            else:
                yield self.rows_of(*(part_BN[:, some] for part_BN in self.parts_BN))

    def numbered_blocks(self) -> Iterator[tuple[slice, mx.array]]:
        """The same, each with the places of its rows."""
        first = 0
        for block_BnM in self.blocks():
            yield slice(first, first + block_BnM.shape[1]), block_BnM
            first += block_BnM.shape[1]

    def summed_up(self, summary: Callable[[mx.array], mx.array]) -> mx.array:
        """`summary(rows)`, (B, n), of all rows in order, (B, N)."""
        return mx.concatenate([summary(block_BnM) for block_BnM in self.blocks()], axis=1)


def cosine_rows(x_BND: mx.array, *, hold: bool = True) -> Rows:
    """The rows of `cosine(x_BND)`; not held where each is read once."""
    x_BND = unit(x_BND)
    return Rows(lambda part_BnD: rounded_cosine(part_BnD @ x_BND.swapaxes(1, 2)), x_BND, hold=hold)


def nearest(
    unit_BnD: mx.array, unit_BMD: mx.array, among_BM: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    """Of each of n tokens the cosine similarity to the most similar of M others, of those
    `among_BM` and else -2, and that one's index, (B, n); of equals the first. All tokens as `unit`
    gives them."""
    n = unit_BnD.shape[1]
    size, similar, index = block_size(n), [], []
    for first in range(0, n, size):
        block_BnM = rounded_cosine(unit_BnD[:, first : first + size] @ unit_BMD.swapaxes(1, 2))
        if among_BM is not None:
            block_BnM = mx.where(among_BM[:, None], block_BnM, NOBODY)
        similar.append(block_BnM.max(axis=-1))
        index.append(mx.argmax(block_BnM, axis=-1))
    return mx.concatenate(similar, axis=1), mx.concatenate(index, axis=1)


def nearest_slots(x_BND: mx.array, index_BK: mx.array) -> tuple[mx.array, mx.array]:
    """Of each token the similarity to the most similar kept one, and its slot, (B, N): that one's,
    or its own where it is kept."""
    x_BND = unit(x_BND)
    similar_BN, nearest_BN = nearest(x_BND, take(x_BND, index_BK))
    slot_K = mx.arange(index_BK.shape[1], dtype=mx.int32)
    slot_BN = nearest_BN.astype(mx.int32)
    slot_BK = mx.broadcast_to(slot_K, index_BK.shape)
    return similar_BN, mx.put_along_axis(slot_BN, index_BK, slot_BK, axis=1)


def nearest_similarity(similar: "Rows | HeldRows", among_BN: mx.array | None = None) -> mx.array:
    """The largest similarity of each token to another one, (B, N): to one of those `among_BN`."""
    token_N, first = mx.arange(similar.N), 0

    def nearest_of(similar_BnN: mx.array) -> mx.array:
        nonlocal first
        n = similar_BnN.shape[1]
        is_other_BnN = token_N[first : first + n, None] != token_N
        if among_BN is not None:
            is_other_BnN = is_other_BnN & among_BN[:, None]
        first += n
        return mx.where(is_other_BnN, similar_BnN, -mx.inf).max(axis=-1)

    return similar.summed_up(nearest_of)
