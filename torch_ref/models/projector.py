"""From the tower's features to the language model's embeddings, named as in the published .pth.

Shapes: B images, N patches, M blocks of m patches, D features, K kept tokens.
"""

from torch import Tensor, nn

from mlx_vlm_prune.checkpoints.config import ProjectorConfig, VLMConfig

from ..pruners import Signals
from ..pruners.attention_pool import AttentionPool


class VisionProj(nn.Module):
    def __init__(self, c: VLMConfig):
        super().__init__()
        self.vision_proj = nn.Sequential(nn.Linear(c.vision.hidden_size, c.text.hidden_size))


class PooledVisionProj(AttentionPool):
    """EfficientVLM's, where the pool's weights lie beside the projector's."""

    def __init__(self, c: VLMConfig, K: int):
        super().__init__(K, c.vision.hidden_size)
        self.vision_proj = nn.Sequential(nn.Linear(c.vision.hidden_size, c.text.hidden_size))


class MLPVisionProj(nn.Module):
    """MiniMind-3V's: of blocks of patches, where they are put together."""

    def __init__(self, c: VLMConfig, projector: ProjectorConfig):
        super().__init__()
        (down, across), out = projector.merge, c.text.hidden_size
        wide = c.vision.hidden_size * down * across
        norm = [nn.LayerNorm(wide)] if projector.norm else []
        self.mlp = nn.Sequential(*norm, nn.Linear(wide, out), nn.GELU(), nn.Linear(out, out))


def vision_proj(c: VLMConfig) -> nn.Module:
    """The projector, with the learned pruner that lies beside it."""
    if c.projector:
        return MLPVisionProj(c, c.projector)
    return PooledVisionProj(c, c.pruner[1]) if c.pruner else VisionProj(c)


def merge_patches(signals: Signals, merge: tuple[int, int]) -> Signals:
    """Signals of blocks of patches: features side by side, row by row; all else by its mean."""
    if merge == (1, 1):
        return signals
    rows, columns = signals.grid[0] // merge[0], signals.grid[1] // merge[1]

    def blocks(x: Tensor, dim: int) -> Tensor:
        """(…, N, …) as (…, M, m, …)."""
        x = x.unflatten(dim, (rows, merge[0], columns, merge[1])).transpose(dim + 1, dim + 2)
        return x.flatten(dim + 2, dim + 3).flatten(dim, dim + 1)

    means = signals.per_token(lambda x, dim: blocks(x, dim).mean(dim + 1))
    return means.replace(grid=(rows, columns), x_BND=blocks(signals.x_BND, 1).flatten(2))
