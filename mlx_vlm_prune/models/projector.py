"""From the tower's features to the language model's embeddings.

MiniMind2-V has one matrix, MiniMind-3V two with a GELU between them. Early MiniMind-3V put
neighbouring patches together before: a visual token is then a block of patches.

Shapes: B images, N patches, M blocks of m patches, D features.
"""

import mlx.core as mx
from mlx import nn

from ..checkpoints.config import ProjectorConfig
from ..pruners.contract import Signals


class MLPProjector(nn.Module):
    """Norm (if there is one), linear, GELU, linear."""

    def __init__(self, dims: int, out: int, c: ProjectorConfig):
        super().__init__()
        wide = dims * c.merge[0] * c.merge[1]
        if c.norm:
            self.norm = nn.LayerNorm(wide, eps=1e-5)
        self.fc1 = nn.Linear(wide, out)
        self.fc2 = nn.Linear(out, out)

    def __call__(self, x_BMD: mx.array) -> mx.array:
        x_BMD = self.norm(x_BMD) if "norm" in self else x_BMD
        return self.fc2(nn.gelu(self.fc1(x_BMD)))


def merge_patches(signals: Signals, merge: tuple[int, int]) -> Signals:
    """Signals of blocks of patches: features side by side, row by row; all else by its mean.

    The grid's sides must be multiples of the block's.
    """
    if merge == (1, 1):
        return signals

    def mean(signal: mx.array, axis: int) -> mx.array:
        blocks = _blocks(mx.moveaxis(signal, axis, 1), signals.grid, merge)
        return mx.moveaxis(blocks.mean(axis=2), 1, axis)

    rows, columns = (n // m for n, m in zip(signals.grid, merge, strict=True))
    x_BMD = _blocks(signals.x_BND, signals.grid, merge).flatten(2)
    return signals.per_token(mean).replace(x_BND=x_BMD, grid=(rows, columns))


def _blocks(x: mx.array, grid: tuple[int, int], merge: tuple[int, int]) -> mx.array:
    """(B, N, …) as (B, M, m, …)."""
    (rows, columns), (down, across), rest = grid, merge, x.shape[2:]
    x = x.reshape(len(x), rows // down, down, columns // across, across, *rest)
    return x.swapaxes(2, 3).reshape(len(x), -1, down * across, *rest)
