"""What the towers in the manner of CLIP and SigLIP share: signals of layers whose inputs are known.

Shapes: I pictures, N patches, S tokens (with CLS where there is one), D features, H heads,
d head size.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx

from ...pruners.contract import Signals
from ...towers.between import Between
from ..layers import split


def signals(
    x_IND: mx.array,
    grid: tuple[int, int],
    want: Mapping[str, int | None],
    layers: Sequence[Any],
    inputs: Sequence[Any],
    has_cls: bool,
    read: Callable[[Any, mx.array], tuple[mx.array, mx.array]] | None = None,
) -> Signals:
    """The signals in `want`, of layers whose `inputs` (I, S, D) are at hand.

    Only the queries and keys of the layers they are read of are computed again.
    """
    run = Between(Signals(x_IND, grid), want, len(layers), (), has_cls)
    for at in sorted(set(run.want.values())):
        run.read(at, *(read or queries_and_keys)(layers[at], inputs[at]))
    return run.signals


def queries_and_keys(layer: Any, x_ISD: mx.array) -> tuple[mx.array, mx.array]:
    """(I, H, S, d) each."""
    own, x_ISD = layer.self_attn, layer.layer_norm1(x_ISD)
    return split(own.q_proj(x_ISD), own.num_heads), split(own.k_proj(x_ISD), own.num_heads)
