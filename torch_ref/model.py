"""MiniMind2-V: encode, prune, project, splice, decode, in PyTorch.

Module names are those of the published .pth and of Hugging Face's CLIP folder, so
both load unrenamed; `tower`, `projector` and `language` are what the parts are.

Shapes: B prompts, I images over all prompts, N visual tokens, K kept, L tokens, D features.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .language.minimind import MiniMind, MiniMindConfig
from .pruners import Reduction
from .towers.clip import CLIPConfig, CLIPTower


def best_device() -> torch.device:
    """CUDA, else Apple's GPU, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


@dataclass(frozen=True)
class VLMConfig:
    """A MiniMind2-V: its tower, its language model, and the placeholder's token id."""

    vision: CLIPConfig = CLIPConfig()
    text: MiniMindConfig = MiniMindConfig()
    image_token_id: int = 34


class VisionEncoder(nn.Module):
    def __init__(self, c: CLIPConfig):
        super().__init__()
        self.vision_model = CLIPTower(c)


class VisionProj(nn.Module):
    def __init__(self, c: VLMConfig):
        super().__init__()
        self.vision_proj = nn.Sequential(nn.Linear(c.vision.hidden_size, c.text.hidden_size))


class VLM(nn.Module):
    """A MiniMind2-V."""

    def __init__(self, config: VLMConfig):
        super().__init__()
        self.config = config
        self.model = MiniMind(config.text)
        self.vision_proj = VisionProj(config)
        self.vision_encoder = VisionEncoder(config.vision)

    @property
    def tower(self) -> CLIPTower:
        return self.vision_encoder.vision_model

    @property
    def projector(self) -> nn.Module:
        return self.vision_proj.vision_proj

    @property
    def language(self) -> MiniMind:
        return self.model
