"""Families whose tower returns the hidden states before each of its layers, as CLIP's does.

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
from ..language_layers import split_heads


class TowerHost(Host):
    """A host with such a tower; a family defines its layers, and their queries and keys."""

    @property
    def encoder_layers(self) -> Sequence[Any]:
        """The layers that signals can be taken from."""
        return self.tower.encoder.layers

    @property
    def depth(self) -> int:
        return len(self.encoder_layers)

    def signals(
        self, x_IND: mx.array, want: Mapping[str, int | None], inputs: Sequence[Any], *,
        grid: tuple[int, int] | None = None, m: int = 1, has_cls: bool = False,
    ) -> Signals:  # fmt: skip
        """The visual tokens with the signals in `want`; `inputs` (I, S, D) are those of the layers.

        The grid is a square unless it is given. Queries and keys are computed a second time, of the
        layers in `want` only.
        """
        side = int(x_IND.shape[1] ** 0.5)
        rows, columns = grid or (side, side)
        patches = Signals(
            mx.zeros((len(x_IND), rows * m * columns * m, 1)), (rows * m, columns * m)
        )
        run = TowerPass(patches, want, self.depth, (), has_cls)
        for layer in sorted(set(run.want.values())):
            behind = layer == self.depth
            module = (self.tower.encoder.layers if behind else self.encoder_layers)[layer]
            run.read(layer, *self.queries_and_keys(module, inputs[layer], patches.grid))
        return merge_patches(run.signals, (m, m)).replace(x_BND=x_IND)

    def queries_and_keys(
        self, layer: Any, x_ISD: mx.array, grid: tuple[int, int]
    ) -> tuple[mx.array, mx.array]:
        """(I, H, S, d) each, rotated by their place in `grid` where the tower does so."""
        attention, x_ISD = layer.self_attn, layer.layer_norm1(x_ISD)
        q_ISD, k_ISD = attention.q_proj(x_ISD), attention.k_proj(x_ISD)
        return split_heads(q_ISD, attention.num_heads), split_heads(k_ISD, attention.num_heads)

    def to_channels_last(self, pixels_I3HW: mx.array) -> mx.array:
        """(I, H, W, 3), in the dtype of the word embeddings."""
        return pixels_I3HW.transpose(0, 2, 3, 1).astype(self.embed(mx.array([0])).dtype)
