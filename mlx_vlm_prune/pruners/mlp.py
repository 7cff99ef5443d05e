"""A small network predicts how useful a token will be, and how many an image needs.

LightVLM (github.com/falenai/LightVLM, its README; the code is no longer public): CLS attention
and a learned scorer of less than a million parameters; an option lets each image have its own
budget, predicted from pooled features. Layout and training are ours: the network reads the
features and CLS's attention, and learns as `score_prune` does. An image's need is the number
of tokens that the full model's loss hangs on (the exponential of the entropy of their shares in its
derivative by the log of the attention that each gets); `dynamic` gives an image K times its
predicted need over the mean need of the training images, so K is what images get in the mean.

With `dynamic` the budgets return to the host, once: shapes depend on them.

Options:
    dynamic: give each image a budget of its own, K in the mean
    layer: number of the tower's layer that is read; -1 is the last

Shapes: B images, N tokens, D features, K kept.
"""

from typing import Any

import mlx.core as mx
from mlx import nn

from .contract import Reduction, Signals, Stage
from .numerics import choosing, exp, keep_highest, on_host, to_choice_dtype
from .scorer import budget_in_turn, layer_norm, linear, score, straight_through

stage = Stage.FEATURES
needs: dict[str, str | None] = {"cls_attention": "layer"}
HIDDEN = 64
NEED_RATE = 0.02  # at which the mean need follows the needs


class Usefulness(nn.Module):
    """The weights, as they lie beside the model under `mlp.`."""

    def __init__(self, dims: int):
        super().__init__()
        self.norm = nn.LayerNorm(dims)
        self.fc1 = nn.Linear(dims + 1, HIDDEN)
        self.fc2 = nn.Linear(HIDDEN, 1)
        self.need = nn.Linear(dims, 1)  # the log of how many tokens
        self.mean_need = mx.ones((1,))  # 1 is untrained; the loss moves it, no optimizer
        self.freeze(keys="mean_need", recurse=False)

    def unfreeze(self, *args: Any, **kwargs: Any) -> nn.Module:
        """All but the mean need."""
        super().unfreeze(*args, **kwargs)
        self.freeze(keys="mean_need", recurse=False)
        return self

    def __call__(self, signals: Signals) -> mx.array:
        """Scores (B, N), with gradients."""
        x_BND = signals.x_BND.astype(mx.float32)
        attention_BN1 = signals.cls_attention_BN.astype(mx.float32)[..., None]
        attention_BN1 = mx.log(attention_BN1 * x_BND.shape[1] + 1e-6)
        input_BND = mx.concatenate([self.norm(x_BND), attention_BN1], axis=-1)
        return self.fc2(nn.relu(self.fc1(input_BND)))[..., 0]

    def log_need(self, signals: Signals) -> mx.array:
        """The log of how many tokens each image needs, (B,), with gradients."""
        x_BND = self.norm(signals.x_BND.astype(mx.float32))
        return self.need(x_BND.mean(axis=1))[:, 0]

    def prune(
        self, signals: Signals, K: int, *, dynamic: bool = False, layer: float = -1
    ) -> Reduction:
        """Keep the K most useful; `dynamic` and `layer` are read by the host."""
        N = signals.x_BND.shape[1]
        with choosing():
            x_BND = layer_norm(signals.x_BND, self.norm)
            attention_BN1 = mx.log(to_choice_dtype(signals.cls_attention_BN) * N + 1e-6)[..., None]
            input_BND = mx.concatenate([x_BND, attention_BN1], axis=-1)
            score_BN = score(input_BND, self.fc1, self.fc2)
            return Reduction(keep_highest(score_BN, K), score_BN=score_BN)

    def budgets(self, signals: Signals, K: int) -> list[int]:
        """Each image's budget, from 1 to N.

        The one return to the host: shapes depend on it.
        """
        N = signals.x_BND.shape[1]
        with choosing():
            pooled_BD = layer_norm(signals.x_BND, self.norm).mean(axis=1)
            need_B = exp(linear(pooled_BD, self.need))[:, 0] / to_choice_dtype(self.mean_need)
            (budgets,) = on_host(mx.clip(mx.floor(K * need_B + 0.5), 1, N))
        return [int(k) for k in budgets]


def make_weights(dims: int, tokens: int) -> Usefulness:
    """Untrained weights for features of so many dimensions; any budget."""
    return Usefulness(dims)


def training_factor(weights: Usefulness, signals: Signals, K: int, noise: float) -> mx.array:
    """On the attention that tokens get, (B, N)."""
    return straight_through(weights(signals), K, noise)


training_budget = budget_in_turn


def training_loss(weights: Usefulness, signals: Signals, gradient_BN: mx.array) -> mx.array:
    """The squared error of the log of the needs, a mean over images; the mean need follows."""
    size_BN = mx.abs(gradient_BN)
    share_BN = size_BN / mx.maximum(size_BN.sum(axis=1, keepdims=True), 1e-12)
    entropy_B = -(share_BN * mx.log(mx.maximum(share_BN, 1e-12))).sum(axis=1)
    if weights.mean_need.item() == 1:  # untrained: start where the needs are
        distance = entropy_B.mean() - mx.stop_gradient(weights.log_need(signals).mean())
        weights.need.bias = weights.need.bias + distance
        weights.mean_need = mx.exp(entropy_B).mean(keepdims=True)
    predicted_B = weights.log_need(signals)
    mean_1 = mx.exp(mx.stop_gradient(predicted_B)).mean(keepdims=True)
    weights.mean_need = weights.mean_need + NEED_RATE * (mean_1 - weights.mean_need)
    return mx.square(predicted_B - entropy_B).mean()
