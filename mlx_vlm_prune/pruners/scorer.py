"""Layers of a small scoring network, so rounded that equal tokens tie; and how scores are trained.

The layers are called under `choosing()`.

Shapes: B images, N tokens, D features, K kept.
"""

from typing import Any

import mlx.core as mx
from mlx import nn

from .numerics import constant, rounded, to_choice_dtype

DROPPED = 1e-20  # the factor of a dropped token: it gets no attention, but a gradient
STEEPEST = 1e12  # of such a gradient: squares of what may come of a larger one are infinite


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


def straight_through(score_BN: mx.array, K: int, noise: float) -> mx.array:
    """A factor (B, N) on the attention that tokens get, while their scores are trained.

    1 for the K highest of the scores plus Gumbel noise, next to 0 for the others; its gradient is
    that of a sigmoid of the distance from the K-th.
    """
    noisy_BN = score_BN + noise * mx.random.gumbel(score_BN.shape)
    line_B1 = mx.stop_gradient(mx.sort(noisy_BN, axis=-1)[:, -K][:, None])
    soft_BN = mx.sigmoid(noisy_BN - line_B1)
    hard_BN = mx.maximum((noisy_BN >= line_B1).astype(mx.float32), DROPPED)
    factor_BN: Any = _bounded_gradient(hard_BN + (soft_BN - mx.stop_gradient(soft_BN)))
    return factor_BN


@mx.custom_function
def _bounded_gradient(factor_BN: mx.array) -> mx.array:
    """The same. Where a dropped token would take all attention from the others, the gradient at
    next to none is what e to the difference of their logits comes to."""
    return factor_BN * 1


@_bounded_gradient.vjp
def _bounded_gradient_vjp(primal: mx.array, gradient_BN: mx.array, factor_BN: mx.array) -> mx.array:
    return mx.clip(gradient_BN, -STEEPEST, STEEPEST)


def budget_in_turn(K: int, step: int) -> int:
    """Half of K, K and twice K in turn: scores then rank tokens for other budgets, too."""
    return max(1, K * 2 ** (step % 3) // 2)
