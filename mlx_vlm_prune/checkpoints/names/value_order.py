"""Values that lie in another order in PyTorch than in MLX or in a later release.

Each change knows both ways, and nothing but moves values: going and coming back gives the
same bytes. `d` is the size of one attention head.
"""

from collections.abc import Callable
from dataclasses import dataclass

from ..errors import UserError
from ..reading.tensors import RawTensor


@dataclass(frozen=True)
class Change:
    """`there(tensor, d)` makes our order of the published one, which has so many `axes`;
    `back(tensor, d)` undoes it."""

    there: Callable[[RawTensor, int], RawTensor]
    back: Callable[[RawTensor, int], RawTensor]
    axes: int


def _pairs_apart(tensor: RawTensor, d: int) -> RawTensor:
    """Of each head's rows first the even ones, then the odd: what was turned as the pairs
    (0, 1), (2, 3), … is turned as (0, d/2), (1, d/2 + 1), … afterwards."""
    rows = [head + i for head in range(0, tensor.shape[0], d) for i in _evens_first(d)]
    return tensor.rows(rows)


def _pairs_together(tensor: RawTensor, d: int) -> RawTensor:
    place = _evens_first(d)
    rows = [head + place.index(i) for head in range(0, tensor.shape[0], d) for i in range(d)]
    return tensor.rows(rows)


def _evens_first(d: int) -> list[int]:
    return [*range(0, d, 2), *range(1, d, 2)]


def _squared(tensor: RawTensor, d: int) -> RawTensor:
    """(out, p * p * 3) as (out, p, p, 3): the values stay where they are."""
    out, columns = tensor.shape
    side = round((columns // 3) ** 0.5)
    if columns != 3 * side * side:
        raise UserError(
            f"a patch embedding of {columns} columns is of no square patch of 3 colours"
        )
    return tensor.reshaped((out, side, side, 3))


def _flat(tensor: RawTensor, d: int) -> RawTensor:
    out, rows, columns, colours = tensor.shape
    return tensor.reshaped((out, rows * columns * colours))


# PyTorch's convolutions have (out, in, height, width), MLX's (out, height, width, in).
CONVOLUTION = Change(
    lambda tensor, d: tensor.permuted((0, 2, 3, 1)),
    lambda tensor, d: tensor.permuted((0, 3, 1, 2)),
    4,
)
# SigLIP 2's NaFlex towers multiply patches laid out flat, colours innermost.
PATCHES = Change(_squared, _flat, 2)
# Early MiniMind2 turned neighbours, as complex numbers; later ones turn the two halves.
INTERLEAVED = Change(_pairs_apart, _pairs_together, 2)
