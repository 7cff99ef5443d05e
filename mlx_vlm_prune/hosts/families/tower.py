"""Families whose tower hands over what goes into each of its layers, in the manner of CLIP.

Shapes: I pictures, N visual tokens of m x m patches each, S tokens of the tower (with CLS where
there is one), D features, H heads, d head size.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx

from ...models.projector import merge_patches
from ...models.towers.signals import TowerPass
from ...pruners.contract import Signals
from ..host import Host
from ..language_layers import split


class TowerHost(Host):
    """A host of such a tower; a family says where its layers are, and how one attends."""

    @property
    def encoder_layers(self) -> Sequence[Any]:
        """The layers that signals can be read of."""
        return self.tower.encoder.layers

    @property
    def depth(self) -> int:
        return len(self.encoder_layers)

    def signals(
        self, x_IND: mx.array, want: Mapping[str, int | None], inputs: Sequence[Any], *,
        grid: tuple[int, int] | None = None, m: int = 1, has_cls: bool = False,
    ) -> Signals:  # fmt: skip
        """The visual tokens with the signals in `want`, of layers whose `inputs` (I, S, D) are
        known. The grid is a square unless it is given.

        Only the queries and keys of the layers they are read of are computed again.
        """
        side = int(x_IND.shape[1] ** 0.5)
        rows, columns = grid or (side, side)
        patches = Signals(
            mx.zeros((len(x_IND), rows * m * columns * m, 1)), (rows * m, columns * m)
        )
        run = TowerPass(patches, want, self.depth, (), has_cls)
        for at in sorted(set(run.want.values())):
            run.read(at, *self.queries_and_keys(self.encoder_layers[at], inputs[at], patches.grid))
        return merge_patches(run.signals, (m, m)).replace(x_BND=x_IND)

    def queries_and_keys(
        self, layer: Any, x_ISD: mx.array, grid: tuple[int, int]
    ) -> tuple[mx.array, mx.array]:
        """(I, H, S, d) each; by `grid` where they are rotated."""
        attention, x_ISD = layer.self_attn, layer.layer_norm1(x_ISD)
        q_ISD, k_ISD = attention.q_proj(x_ISD), attention.k_proj(x_ISD)
        return split(q_ISD, attention.num_heads), split(k_ISD, attention.num_heads)

    def to_channels_last(self, pixels_I3HW: mx.array) -> mx.array:
        """(I, H, W, 3), in the dtype that words have."""
        return pixels_I3HW.transpose(0, 2, 3, 1).astype(self.embed(mx.array([0])).dtype)
