"""State dicts from published names and layouts to ours, and back, by the tables of names.py.

`d` is the size of one attention head.
"""

from collections.abc import Mapping
from pathlib import Path

from ..errors import UserError
from ..reading.tensors import FLOATS, RawTensor
from .tables import Table, published_order, to_ours, to_published

Tensors = Mapping[str, RawTensor]


def renamed(state: Tensors, table: Table, title: str, where: Path) -> dict[str, RawTensor]:
    """Every tensor under our name, in its published layout.

    UserError for one that has no place in a model with that title, or is of another kind.
    """
    ours: dict[str, RawTensor] = {}
    for name, tensor in state.items():
        place = to_ours(table, name)
        if place is None:
            raise UserError(f"{where} holds a tensor {name}; {title} has no place for it")
        new, rule = place
        if tensor.dtype not in FLOATS:
            raise UserError(f"{where}: tensor {name} is {tensor.dtype}; F32, F16 or BF16 is needed")
        if rule.change and len(tensor.shape) != rule.change.axes:
            raise UserError(
                f"{where}: tensor {name} has shape {tensor.shape}, not {rule.change.axes} axes"
            )
        ours[new] = tensor
    return ours


def as_ours(tensors: Tensors, table: Table, d: int) -> dict[str, RawTensor]:
    """Tensors that have our names, their values in our order."""
    ours = {}
    for name, tensor in tensors.items():
        place = to_published(table, name)
        change = place and place[1].change
        ours[name] = change.there(tensor, d) if change else tensor
    return ours


def as_published(tensors: Tensors, table: Table, d: int, where: Path) -> dict[str, RawTensor]:
    """Our tensors under the names of a table, in its layout and order."""
    state: dict[str, RawTensor] = {}
    for name, tensor in tensors.items():
        place = to_published(table, name)
        if place is None:
            raise UserError(f"{where} holds a tensor {name} that its layout has no place for")
        new, rule = place
        state[new] = rule.change.back(tensor, d) if rule.change else tensor
    return {name: state[name] for name in published_order(table, state)}


def check_tied(tensors: Tensors, head: str, embedding: str, where: Path) -> None:
    """UserError where the output layer is not the embedding."""
    last, first = tensors.get(head), tensors.get(embedding)
    if last is not None and first is not None and last != first:
        raise UserError(f"{where}: {head} differs from the embedding it should be tied to")
