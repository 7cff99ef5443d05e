"""State dicts from published names and order to ours, and back, by the rules of a table.

`head_dim` is the size of one attention head.
"""

from collections.abc import Mapping
from pathlib import Path

from ..errors import UserError, clipped
from ..reading.tensors import FLOATS, RawTensor
from .rules import Table, published_order, to_ours, to_published

Tensors = Mapping[str, RawTensor]


def to_our_names(state: Tensors, table: Table, title: str, where: Path) -> dict[str, RawTensor]:
    """Every tensor under our name, its values in the published order.

    Raises UserError for a tensor that has no place in the model called `title`, and for one of
    another dtype or number of axes.
    """
    ours: dict[str, RawTensor] = {}
    for name, tensor in state.items():
        match = to_ours(table, name)
        if match is None:
            raise UserError(f"{where} holds a tensor {clipped(name)}; {title} has no place for it")
        new_name, rule = match
        if tensor.dtype not in FLOATS:
            raise UserError(
                f"{where}: tensor {clipped(name)} is {tensor.dtype}; F32, F16 or BF16 is needed"
            )
        if rule.reordering and len(tensor.shape) != rule.reordering.axes:
            raise UserError(
                f"{where}: tensor {clipped(name)} has shape {tensor.shape}, not"
                f" {rule.reordering.axes} axes"
            )
        ours[new_name] = tensor
    return ours


def to_our_order(tensors: Tensors, table: Table, head_dim: int) -> dict[str, RawTensor]:
    """Tensors that have our names already, their values in our order."""
    ours = {}
    for name, tensor in tensors.items():
        match = to_published(table, name)
        reordering = match and match[1].reordering
        ours[name] = reordering.to_ours(tensor, head_dim) if reordering else tensor
    return ours


def to_published_layout(
    tensors: Tensors, table: Table, head_dim: int, where: Path
) -> dict[str, RawTensor]:
    """Our tensors under the published names of a table, in its order of tensors and values."""
    state: dict[str, RawTensor] = {}
    for name, tensor in tensors.items():
        match = to_published(table, name)
        if match is None:
            raise UserError(
                f"{where} holds a tensor {clipped(name)} that its layout has no place for"
            )
        new_name, rule = match
        reordering = rule.reordering
        state[new_name] = reordering.to_published(tensor, head_dim) if reordering else tensor
    return {name: state[name] for name in published_order(table, state)}


def check_tied(tensors: Tensors, head: str, embedding: str, where: Path) -> None:
    """UserError where the output layer is not the embedding."""
    last, first = tensors.get(head), tensors.get(embedding)
    if last is not None and first is not None and last != first:
        raise UserError(f"{where}: {head} differs from the embedding it should be tied to")
