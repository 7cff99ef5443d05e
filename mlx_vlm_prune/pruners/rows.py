"""Rows of a large matrix, such as the similarities of every two tokens, as they are needed.

Shapes: B images, N tokens, n of them, M entries of a row, D features.
"""

from collections.abc import Callable, Iterator

import mlx.core as mx

from .contract import take
from .numerics import rounded_cosine, unit

MOST_HELD = 8192  # rows of a matrix that is held: 0.5 GB in float64
BLOCK = 128  # rows at a time; MLX allocates about ten results ahead


class Rows:
    """A matrix with a row for each of N tokens: all rows are computed at once and held, or, of more
    than `MOST_HELD`, each whenever it is read.

    `rows_of(*parts)` computes the rows (B, n, M) of n tokens from their `parts` (B, n, ...).
    """

    def __init__(self, rows_of: Callable[..., mx.array], *parts_BN: mx.array) -> None:
        self.rows_of, self.parts_BN = rows_of, parts_BN
        self.N = parts_BN[0].shape[1]
        self.all_BNM = rows_of(*parts_BN) if self.N <= MOST_HELD else None

    def take(self, index_Bn: mx.array) -> mx.array:
        """The rows of some tokens, (B, n, M)."""
        if self.all_BNM is not None:
            return take(self.all_BNM, index_Bn)
        return self.rows_of(*(take(part_BN, index_Bn) for part_BN in self.parts_BN))

    def blocks(self) -> Iterator[mx.array]:
        """All rows in order, (B, n, M) at a time; on a GPU, where a launch costs more than the
        memory, those that are held at once."""
        is_one = self.all_BNM is not None and self.all_BNM.dtype == mx.float32
        size = self.N if is_one else BLOCK
        for first in range(0, self.N, size):
            some = slice(first, first + size)
            if self.all_BNM is not None:
                yield self.all_BNM[:, some]
            else:
                yield self.rows_of(*(part_BN[:, some] for part_BN in self.parts_BN))


def cosine_rows(x_BND: mx.array) -> Rows:
    """The rows of `cosine(x_BND)`."""
    x_BND = unit(x_BND)
    return Rows(lambda part_BnD: rounded_cosine(part_BnD @ x_BND.swapaxes(1, 2)), x_BND)


def nearest_similarity(similar: Rows, among_BN: mx.array | None = None) -> mx.array:
    """The largest similarity of each token to another one, (B, N): to one of those `among_BN`."""
    token_N, first, nearest = mx.arange(similar.N), 0, []
    for similar_BnN in similar.blocks():
        n = similar_BnN.shape[1]
        is_other_BnN = token_N[first : first + n, None] != token_N
        if among_BN is not None:
            is_other_BnN = is_other_BnN & among_BN[:, None]
        nearest.append(mx.where(is_other_BnN, similar_BnN, -mx.inf).max(axis=-1))
        first += n
    return mx.concatenate(nearest, axis=1)
