"""The parts of a MiniMind-V under the names of the published .pth.

Shapes: B images, N patches, D features, K kept tokens.
"""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from mlx_vlm_prune.checkpoints.config import CLIPConfig, MiniMindConfig, SiglipConfig
from mlx_vlm_prune.checkpoints.config import VLMConfig as Sizes

from .pruners import Signals
from .pruners.attention_pool import AttentionPool
from .towers.clip import CLIPTower
from .towers.siglip import SiglipTower


@dataclass(frozen=True)
class VLMConfig:
    """A MiniMind-V: its tower, its language model, and the tokens with a meaning."""

    vision: CLIPConfig = field(default_factory=CLIPConfig)
    text: Any = field(default_factory=MiniMindConfig)  # or the TextConfig of one of transformers'
    image_token_id: int = 34
    eos_token_id: int = 2
    pool_tokens: int | None = None  # how many tokens its learned pruner keeps, where it has one
    merge: tuple[int, int] | None = None  # MiniMind-3V: the block of patches that is one token
    projector_norm: bool = True


class VisionEncoder(nn.Module):
    def __init__(self, c: CLIPConfig):
        super().__init__()
        self.vision_model = SiglipTower(c) if isinstance(c, SiglipConfig) else CLIPTower(c)


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

    def __init__(self, c: VLMConfig):
        super().__init__()
        assert c.merge
        wide, out = c.vision.hidden_size * c.merge[0] * c.merge[1], c.text.hidden_size
        norm = [nn.LayerNorm(wide)] if c.projector_norm else []
        self.mlp = nn.Sequential(*norm, nn.Linear(wide, out), nn.GELU(), nn.Linear(out, out))


def config_of(sizes: Sizes) -> VLMConfig:
    """Of what a checkpoint's config.json says."""
    projector = sizes.projector
    return VLMConfig(
        sizes.vision,
        sizes.text,
        sizes.image_token_id,
        pool_tokens=sizes.pruner and sizes.pruner[1],
        merge=projector.merge if projector else None,
        projector_norm=projector.norm if projector else True,
    )


def vision_proj(c: VLMConfig) -> nn.Module:
    """The projector, with the learned pruner that lies beside it."""
    if c.merge:
        return MLPVisionProj(c)
    return PooledVisionProj(c, c.pool_tokens) if c.pool_tokens else VisionProj(c)


def merged(signals: Signals, merge: tuple[int, int] | None) -> Signals:
    """Signals of blocks of patches: features side by side, row by row; all else by its mean."""
    if merge in (None, (1, 1)):
        return signals
    assert merge
    rows, columns = signals.grid[0] // merge[0], signals.grid[1] // merge[1]

    def blocks(x: Tensor, dim: int) -> Tensor:
        """(…, N, …) as (…, M, m, …)."""
        x = x.unflatten(dim, (rows, merge[0], columns, merge[1])).transpose(dim + 1, dim + 2)
        return x.flatten(dim + 2, dim + 3).flatten(dim, dim + 1)

    seen = signals.each(lambda x, dim: blocks(x, dim).mean(dim + 1))
    return seen.replace(grid=(rows, columns), x_BND=blocks(signals.x_BND, 1).flatten(2))
