"""The contract's two classes, cut down to what is written into a pruned.py.

Shapes: B pictures, N visual tokens, K kept, D features.
"""

from dataclasses import dataclass

import mlx.core as mx


@dataclass(frozen=True)
class Signals:
    """What a method sees of a picture: its tokens in raster order, and what CLS attends to."""

    x_BND: mx.array
    grid: tuple[int, int]  # (rows, columns)
    cls_attention_BN: mx.array | None = None

    def replace(self, x_BND: mx.array) -> "Signals":
        """The same picture's other tokens."""
        return Signals(x_BND, self.grid, self.cls_attention_BN)


@dataclass(frozen=True)
class Reduction:
    """Which tokens stay, ascending; `weight_BKN`: how each is mixed from all, if it is."""

    index_BK: mx.array
    weight_BKN: mx.array | None = None

    def apply(self, x_BND: mx.array) -> mx.array:
        """(B, N, D) to (B, K, D)."""
        if self.weight_BKN is None:
            return mx.take_along_axis(x_BND, self.index_BK[..., None], axis=1)
        mixed = self.weight_BKN.astype(mx.float32) @ x_BND.astype(mx.float32)
        return mixed.astype(x_BND.dtype)
