"""SigLIP inside a host: signals of blocks of patches.

Shapes: I pictures, P patches, N visual tokens of m x m patches, D features.
"""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from ...projector import merged
from ...pruners.contract import Signals
from ..host import Host
from .common import signals


def encode(
    tower: Any,
    out: tuple[mx.array, Any, tuple[mx.array, ...]],
    want: Mapping[str, int | None],
    m: int,
) -> Signals:
    """Signals of blocks of m x m patches; the tokens still side by side."""
    x_IPD, _, states = out
    side = int(states[0].shape[1] ** 0.5)
    seen = signals(x_IPD, (side, side), want, tower.encoder.layers, states, has_cls=False)
    return merged(seen, (m, m))


class SiglipHost(Host):
    """A host whose `vision_tower` is a SigLIP."""

    @property
    def depth(self) -> int:
        return len(self.model.vision_tower.vision_model.encoder.layers)

    def as_read(self, pixels_I3HW: mx.array) -> mx.array:
        """(I, H, W, 3), in the dtype that words have."""
        return pixels_I3HW.transpose(0, 2, 3, 1).astype(self.embed(mx.array([0])).dtype)
