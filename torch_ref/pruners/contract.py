"""What a pruner sees and what it answers: the reference's copy of the contract.

Shapes: B images, N visual tokens, K kept, D features.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Signals:
    """The tokens of B images and, where asked for, what a method scores them by."""

    x_BND: Tensor
    grid: tuple[int, int]
    cls_attention_BN: Tensor | None = None
    keys_BND: Tensor | None = None


@dataclass(frozen=True)
class Reduction:
    """Which tokens stand for each kept slot, and how each slot is made."""

    index_BK: Tensor | None = None
    weight_BKN: Tensor | None = None
    value_BND: Tensor | None = None

    def apply(self, x_BND: Tensor) -> Tensor:
        """Reduce (B, N, ...) to (B, K, ...)."""
        if self.weight_BKN is not None:
            return (self.weight_BKN.float() @ x_BND.float()).to(x_BND.dtype)
        assert self.index_BK is not None
        return x_BND.take_along_dim(self.index_BK[..., None], dim=1)

    def tokens(self, x_BND: Tensor) -> Tensor:
        """The kept tokens: of x, or of the learned values where the pruner gave some."""
        return self.apply(x_BND if self.value_BND is None else self.value_BND)


def top(score_BN: Tensor, K: int) -> Tensor:
    """The K highest scores' indices, ascending; of equal scores the lower index."""
    order_BN = score_BN.argsort(dim=-1, descending=True, stable=True)
    return order_BN[:, :K].sort(dim=-1).values
