"""The parts of a MiniMind2-V under the names of the published .pth.

Shapes: K kept tokens.
"""

from dataclasses import dataclass, field

from torch import nn

from .language.minimind import MiniMindConfig
from .pruners.attention_pool import AttentionPool
from .towers.clip import CLIPConfig, CLIPTower


@dataclass(frozen=True)
class VLMConfig:
    """A MiniMind2-V: its tower, its language model, and the tokens with a meaning."""

    vision: CLIPConfig = field(default_factory=CLIPConfig)
    text: MiniMindConfig = field(default_factory=MiniMindConfig)
    image_token_id: int = 34
    eos_token_id: int = 2
    pool_tokens: int | None = None  # how many tokens its learned pruner keeps, where it has one


class VisionEncoder(nn.Module):
    def __init__(self, c: CLIPConfig):
        super().__init__()
        self.vision_model = CLIPTower(c)


class VisionProj(nn.Module):
    def __init__(self, c: VLMConfig):
        super().__init__()
        self.vision_proj = nn.Sequential(nn.Linear(c.vision.hidden_size, c.text.hidden_size))


class PooledVisionProj(AttentionPool):
    """EfficientVLM's, where the pool's weights lie beside the projector's."""

    def __init__(self, c: VLMConfig, K: int):
        super().__init__(K, c.vision.hidden_size)
        self.vision_proj = nn.Sequential(nn.Linear(c.vision.hidden_size, c.text.hidden_size))
