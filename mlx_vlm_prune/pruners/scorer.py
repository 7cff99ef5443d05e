"""Layers of a small scoring network, evaluated in float64, so that equal tokens tie.

Called under `mx.stream(mx.cpu)`.

Shapes: B images, N tokens, D features.
"""

import mlx.core as mx
from mlx import nn

from .numerics import rounded, to_float64


def layer_norm(x_BND: mx.array, norm: nn.LayerNorm) -> mx.array:
    x_BND = to_float64(x_BND)
    x_BND = x_BND - x_BND.mean(axis=-1, keepdims=True)
    square_BN1 = mx.square(x_BND).mean(axis=-1, keepdims=True)
    x_BND = x_BND / mx.sqrt(square_BN1 + mx.array(norm.eps, mx.float64))
    return x_BND * to_float64(norm.weight) + to_float64(norm.bias)


def linear(x: mx.array, layer: nn.Linear) -> mx.array:
    return x @ to_float64(layer.weight).T + to_float64(layer.bias)


def score(x_BND: mx.array, fc1: nn.Linear, fc2: nn.Linear) -> mx.array:
    """A number for each token, (B, N), from one hidden layer with ReLU."""
    return rounded(linear(mx.maximum(linear(x_BND, fc1), 0), fc2)[..., 0])
