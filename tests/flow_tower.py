"""A tower of nine layers with weights by formula, on which FlowCut's own code was run, too."""

import mlx.core as mx
import numpy as np
import torch

from mlx_vlm_prune.checkpoints.config import CLIPConfig
from mlx_vlm_prune.models.towers.vit import VisionTower
from torch_ref.models.towers.vit import VisionTower as ReferenceTower

CONFIG = CLIPConfig(
    hidden_size=24,
    intermediate_size=32,
    num_hidden_layers=9,
    num_attention_heads=3,
    image_size=32,
    patch_size=4,
)
N = 64


def waves(count: int, phase: float) -> torch.Tensor:
    """Numbers from -1 to 1 that repeat nowhere."""
    i = torch.arange(count, dtype=torch.float64)
    return torch.sin(0.9 * i + 0.013 * i * i + phase)


def reference_tower(seed: int) -> ReferenceTower:
    """In the reference."""
    tower = ReferenceTower(CONFIG).eval()
    for k, (name, parameter) in enumerate(sorted(tower.named_parameters())):
        value = waves(parameter.numel(), 1.7 * k + 0.3 * seed).reshape(parameter.shape)
        if parameter.ndim > 1:
            value = (2.5 if "q_proj" in name else 1.2) * value / parameter[0].numel() ** 0.5
        else:
            value = 0.2 * value + ("norm" in name and name.endswith("weight"))
        parameter.data = value.float()
    return tower


def mlx_tower(reference: ReferenceTower) -> VisionTower:
    """The same in MLX."""
    tower = VisionTower(CONFIG)
    weights = {name: p.detach().numpy() for name, p in reference.named_parameters()}
    patches = "embeddings.patch_embedding.weight"
    weights[patches] = weights[patches].transpose(0, 2, 3, 1)
    tower.load_weights([(name, mx.array(array)) for name, array in weights.items()])
    return tower


def pixels(seed: int) -> np.ndarray:
    """Two images (2, 32, 32, 3): a busy one, and one that is flat but for a spot."""
    busy = waves(32 * 32 * 3, 0.1 + seed).reshape(32, 32, 3).numpy()
    flat = np.full((32, 32, 3), 0.2)
    flat[5:13, 9 + seed : 20 + seed] = 2 * busy[5:13, 9 + seed : 20 + seed]
    return np.stack([busy, flat]).astype(np.float32)
