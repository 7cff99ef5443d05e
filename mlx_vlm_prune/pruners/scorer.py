"""A small scoring network, evaluated in float64: equal tokens get equal scores, so they tie.

Call under `mx.stream(mx.cpu)`. Shapes: B images, N tokens, D features.
"""

import mlx.core as mx
from mlx import nn

from .contract import rounded, wide


def layer_norm(x_BND: mx.array, norm: nn.LayerNorm) -> mx.array:
    x_BND = wide(x_BND)
    x_BND = x_BND - x_BND.mean(axis=-1, keepdims=True)
    square_BN1 = mx.square(x_BND).mean(axis=-1, keepdims=True)
    x_BND = x_BND / mx.sqrt(square_BN1 + mx.array(norm.eps, mx.float64))
    return x_BND * wide(norm.weight) + wide(norm.bias)


def linear(x: mx.array, layer: nn.Linear) -> mx.array:
    return x @ wide(layer.weight).T + wide(layer.bias)


def score(x_BND: mx.array, fc1: nn.Linear, fc2: nn.Linear) -> mx.array:
    """One number per token, (B, N), of one hidden layer with ReLU."""
    return rounded(linear(mx.maximum(linear(x_BND, fc1), 0), fc2)[..., 0])
