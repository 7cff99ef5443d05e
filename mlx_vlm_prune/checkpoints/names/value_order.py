"""Values in another order in PyTorch than in MLX: convolutions, patches, rotated rows.

A reordering only moves values: there and back gives the same bytes. `head_dim` is the size of one
attention head.
"""

from collections.abc import Callable
from dataclasses import dataclass

from ..errors import UserError
from ..reading.tensors import RawTensor


@dataclass(frozen=True)
class Reordering:
    """`to_ours(tensor, head_dim)` makes our order of the published one, `to_published` the reverse.

    The published tensor has `axes` axes.
    """

    to_ours: Callable[[RawTensor, int], RawTensor]
    to_published: Callable[[RawTensor, int], RawTensor]
    axes: int


def _halves_from_pairs(tensor: RawTensor, head_dim: int) -> RawTensor:
    """Each head's even rows, then its odd ones: rotary pairs (0, 1), (2, 3), … become
    (0, d/2), (1, d/2 + 1), …"""
    order = _evens_first(head_dim)
    return tensor.rows([head + i for head in range(0, tensor.shape[0], head_dim) for i in order])


def _pairs_from_halves(tensor: RawTensor, head_dim: int) -> RawTensor:
    order = _evens_first(head_dim)
    back = [order.index(i) for i in range(head_dim)]
    return tensor.rows([head + i for head in range(0, tensor.shape[0], head_dim) for i in back])


def _evens_first(head_dim: int) -> list[int]:
    return [*range(0, head_dim, 2), *range(1, head_dim, 2)]


def _square_patches(tensor: RawTensor, head_dim: int) -> RawTensor:
    """(out, p * p * 3) as (out, p, p, 3): the values stay where they are."""
    out, columns = tensor.shape
    side = round((columns // 3) ** 0.5)
    if columns != 3 * side * side:
        raise UserError(
            f"a patch embedding of {columns} columns is of no square patch of 3 colours"
        )
    return tensor.reshaped((out, side, side, 3))


def _flat_patches(tensor: RawTensor, head_dim: int) -> RawTensor:
    out, rows, columns, colours = tensor.shape
    return tensor.reshaped((out, rows * columns * colours))


# PyTorch's convolutions have (out, in, height, width), MLX's (out, height, width, in).
CONVOLUTION = Reordering(
    lambda tensor, head_dim: tensor.permuted((0, 2, 3, 1)),
    lambda tensor, head_dim: tensor.permuted((0, 3, 1, 2)),
    4,
)
# SigLIP 2's NaFlex towers multiply patches laid out flat, colours innermost.
PATCHES = Reordering(_square_patches, _flat_patches, 2)
# Early MiniMind2 rotates neighbouring rows, as complex numbers; later ones rotate the two halves.
INTERLEAVED = Reordering(_halves_from_pairs, _pairs_from_halves, 2)
