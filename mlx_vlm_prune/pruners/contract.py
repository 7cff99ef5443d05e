"""What a pruner sees, and what it answers. Everything else is a method's own.

Shapes: B images, N visual tokens, K kept slots, D features.
"""

from dataclasses import dataclass
from enum import Enum
from functools import cached_property

import mlx.core as mx


class Stage(Enum):
    """Where in the model a method works."""

    FEATURES = "features"  # end of the tower
    PROJECTED = "projected"  # what the projector hands over


@dataclass(frozen=True)
class Signals:
    """The tokens of B images and, where a method asked for it, what it scores them by.

    `x_BND` are the tokens, `grid` their (rows, columns), `cls_attention_BN` what CLS
    attends to (mean over heads, its share of itself left out), `keys_BND` a layer's keys.
    """

    x_BND: mx.array
    grid: tuple[int, int]
    cls_attention_BN: mx.array | None = None
    keys_BND: mx.array | None = None


@dataclass(frozen=True)
class Reduction:
    """How N tokens become K slots; it never touches a model.

    `index_BK`, ascending and distinct: the token that stands for each slot, and whose
    position the slot takes. None where slots are pooled from everywhere: they have no
    anchor and are renumbered.
    `weight_BKN`: how each slot is mixed from the N tokens. None: its token, unchanged.
    `value_BND`: what is mixed in place of the tokens, where a learned method has values.
    """

    index_BK: mx.array | None = None
    weight_BKN: mx.array | None = None
    value_BND: mx.array | None = None

    def apply(self, x_BND: mx.array) -> mx.array:
        """Reduce (B, N, D) tokens, positions or sizes to (B, K, D)."""
        if self.weight_BKN is not None:
            mixed = self.weight_BKN.astype(mx.float32) @ x_BND.astype(mx.float32)
            return mixed.astype(x_BND.dtype)
        assert self.index_BK is not None, "a reduction needs an index or weights"
        return mx.take_along_axis(x_BND, self.index_BK[..., None], axis=1)

    def tokens(self, x_BND: mx.array) -> mx.array:
        """The kept tokens: `apply` to x, or to the learned values."""
        return self.apply(x_BND if self.value_BND is None else self.value_BND)

    @cached_property
    def parts(self) -> list[mx.array]:
        """The arrays that are there, to evaluate together."""
        return [a for a in (self.index_BK, self.weight_BKN, self.value_BND) if a is not None]


def identity(x_BND: mx.array) -> Reduction:
    """Every token stands for itself."""
    B, N, _ = x_BND.shape
    return Reduction(index_BK=mx.broadcast_to(mx.arange(N), (B, N)))


def keep_highest(score_BN: mx.array, K: int) -> mx.array:
    """Indices (B, K), ascending, of the K highest scores; ties go to the lower index."""
    order_BN = mx.argsort(-score_BN.astype(mx.float32), axis=-1)  # stable
    return mx.sort(order_BN[:, :K], axis=-1)
