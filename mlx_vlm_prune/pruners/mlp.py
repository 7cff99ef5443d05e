"""A small network predicts how useful a token will be, and how many an image needs.

LightVLM (its README; the code is no longer public): CLS attention and a learned scorer of
less than a million parameters; an option lets each image have its own budget, predicted
from pooled features. Layout and training are ours: the network reads the features and CLS's
attention, and learns as `score_prune` does. An image's need is the number of tokens that
the full model's loss hangs on (the exponential of the entropy of their shares in its
derivative by the log of the attention that each gets); `dynamic` gives an image K times its
predicted need over the mean need of the training images, so K is what images get in the mean.

With `dynamic` the budgets return to the host, once: shapes depend on them.

Options:
    dynamic: give each image a budget of its own, K in the mean
    layer: number of the tower's layer that is read; -1 is the last

Shapes: B images, N tokens, D features, K kept.
"""

import mlx.core as mx
from mlx import nn

from .contract import Reduction, Signals, Stage
from .numerics import choosing, exp, keep_highest, on_host, to_choice_dtype
from .scorer import layer_norm, linear, score

stage = Stage.FEATURES
needs: dict[str, str | None] = {"cls_attention": "layer"}
HIDDEN = 64


class Usefulness(nn.Module):
    """The weights, as they lie beside the model under `mlp.`."""

    def __init__(self, dims: int):
        super().__init__()
        self.norm = nn.LayerNorm(dims)
        self.fc1 = nn.Linear(dims + 1, HIDDEN)
        self.fc2 = nn.Linear(HIDDEN, 1)
        self.need = nn.Linear(dims, 1)  # the log of how many tokens
        self.mean_need = mx.zeros((1,))

    def prune(
        self, signals: Signals, K: int, *, dynamic: bool = False, layer: float = -1
    ) -> Reduction:
        """Keep the K most useful; `dynamic` and `layer` are read by the host."""
        N = signals.x_BND.shape[1]
        with choosing():
            x_BND = layer_norm(signals.x_BND, self.norm)
            attention_BN1 = mx.log(to_choice_dtype(signals.cls_attention_BN) * N + 1e-6)[..., None]
            input_BND = mx.concatenate([x_BND, attention_BN1], axis=-1)
            return Reduction(index_BK=keep_highest(score(input_BND, self.fc1, self.fc2), K))

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
