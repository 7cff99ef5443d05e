"""Layers of a small scoring network, so rounded that equal tokens tie.

Called under `choosing()`.

Shapes: B images, N tokens, D features.
"""

import mlx.core as mx
from mlx import nn

from .numerics import constant, rounded, to_choice_dtype


def layer_norm(x_BND: mx.array, norm: nn.LayerNorm) -> mx.array:
    x_BND = to_choice_dtype(x_BND)
    x_BND = x_BND - x_BND.mean(axis=-1, keepdims=True)
    square_BN1 = mx.square(x_BND).mean(axis=-1, keepdims=True)
    x_BND = x_BND / mx.sqrt(square_BN1 + constant(norm.eps))
    return x_BND * to_choice_dtype(norm.weight) + to_choice_dtype(norm.bias)


def linear(x: mx.array, layer: nn.Linear) -> mx.array:
    return x @ to_choice_dtype(layer.weight).T + to_choice_dtype(layer.bias)


def score(x_BND: mx.array, fc1: nn.Linear, fc2: nn.Linear) -> mx.array:
    """A number for each token, (B, N), from one hidden layer with ReLU."""
    return rounded(linear(mx.maximum(linear(x_BND, fc1), 0), fc2)[..., 0])
