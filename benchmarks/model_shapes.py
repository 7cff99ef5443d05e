"""The model sizes that are measured, and random requests to them.

Times do not depend on the values of weights, so weights are random. Answers do, so they are not
judged.
"""

import io
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten
from PIL import Image

from mlx_vlm_prune.checkpoints.command_line import suggestion
from mlx_vlm_prune.checkpoints.config import (
    CONFIG,
    CLIPConfig,
    MiniMindConfig,
    ProjectorConfig,
    SiglipConfig,
    VLMConfig,
    parse_config,
)
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.checkpoints.reading.files import read_json
from mlx_vlm_prune.inputs.image import open_image
from mlx_vlm_prune.inputs.preprocessor import Preprocessor, siglip_preprocessor
from mlx_vlm_prune.inputs.prompt import Prompt
from mlx_vlm_prune.models.vlm import VLM
from mlx_vlm_prune.scenes import CHECKPOINT

BUILT_IN = parse_config(read_json(CHECKPOINT / CONFIG), CHECKPOINT / CONFIG)
TEXT_TOKENS = 30  # of MiniMind-V's prompt around the image
PHOTO = (1024, 768)  # pixels of the JPEG that is opened
LARGE = CLIPConfig(1024, 4096, 24, 16, 336, 14)  # CLIP ViT-L/14 at 336 pixels, LLaVA-1.5's tower
SHAPES = {
    "minimind2-v-small": VLMConfig(),
    "minimind2-v": VLMConfig(text=MiniMindConfig(768, 2048, 16)),
    "minimind-3v": VLMConfig(
        SiglipConfig(),
        MiniMindConfig(768, 2432, 8, 8, 4, rms_norm_eps=1e-6, qk_norm=True),
        ProjectorConfig(),
        "<|image_pad|>",
        12,
    ),
    "scenes": BUILT_IN,
    # LLaVA-1.5 for small machines: 8 layers as wide as those of a model of 1 B, and
    # 2 of the 32 layers of 7 B, with its projector. Both take long enough to be timed.
    "llava-8": VLMConfig(LARGE, MiniMindConfig(2048, 5504, 8, 16, 16, 32000)),
    "llava-7b-2": VLMConfig(
        LARGE,
        MiniMindConfig(4096, 11008, 2, 32, 32, 32000, rope_theta=1e4),
        ProjectorConfig(norm=False),
    ),
}
# All of LLaVA-1.5-7B, whose output layer has weights of its own, and cuts of it for less memory.
VICUNA = MiniMindConfig(4096, 11008, 32, 32, 32, 32000, rope_theta=1e4, tie_word_embeddings=False)
WHOLE = "llava-7b"
LAYERS = {WHOLE: 32, "llava-7b-16": 16, "llava-7b-8": 8, "llava-7b-4": 4}
SHAPES |= {
    name: VLMConfig(LARGE, replace(VICUNA, num_hidden_layers=layers), ProjectorConfig(norm=False))
    for name, layers in LAYERS.items()
}


def shape(name: str, side: int | None = None) -> VLMConfig:
    """The config of a name in SHAPES; `side`, in pixels, replaces its image size.

    Raises UserError for an unknown name or a side that the patches do not divide.
    """
    if name not in SHAPES:
        raise UserError(f"no shape is called {name!r}; {suggestion(name, SHAPES)}")
    config = SHAPES[name]
    if side is None:
        return config
    merge = config.projector.merge if config.projector else (1, 1)
    block = config.vision.patch_size * max(merge)
    if side < block or side % block:
        raise UserError(f"--side is {side}; of {name} it must be a multiple of {block}")
    return replace(config, vision=replace(config.vision, image_size=side))


def parameter_counts(config: VLMConfig) -> dict[str, int]:
    """The numbers of parameters of tower, projector and language model."""
    model = VLM(config)  # lazy: no weight is computed
    parts = {"tower": model.tower, "projector": model.projector, "language": model.language}
    return {name: _size(part) for name, part in parts.items()}


def _size(module: nn.Module) -> int:
    weights: Any = tree_flatten(module.parameters())
    return sum(array.size for _, array in weights)


@dataclass(frozen=True)
class Request:
    """B prompts, each with one image in its middle, and the images' files.

    `opened_IHW3` are the pixels of files that need not be opened any more.
    """

    rows: list[Prompt]
    files: list[bytes]
    preprocessor: Preprocessor
    opened_IHW3: mx.array | None = None

    def pixels_IHW3(self) -> Any:
        """Preprocessed pixels of the images, opened from their files."""
        if self.opened_IHW3 is not None:
            return self.opened_IHW3
        return np.stack([self.preprocessor(open_image(file)) for file in self.files])


def request(config: VLMConfig, text: int = TEXT_TOKENS, batch: int = 1) -> Request:
    """`batch` prompts of `text` text tokens, and as many photographs."""
    side = config.vision.image_size
    clip = Preprocessor(size=side, crop=(side, side))
    siglip = isinstance(config.vision, SiglipConfig)
    return Request(
        [prompt(config, text)] * batch,
        [photo(seed) for seed in range(batch)],
        siglip_preprocessor(side) if siglip else clip,
    )


def prompt(config: VLMConfig, text: int = TEXT_TOKENS) -> Prompt:
    """`text` text tokens with one image's placeholders in the middle."""
    N, half = config.N, text // 2
    words = [13 + i % 80 for i in range(text)]
    return Prompt(words[:half] + [config.image_token_id] * N + words[half:], [(half, N)])


def photo(seed: int, size: tuple[int, int] = PHOTO) -> bytes:
    """A JPEG with a photograph's frequencies: soft colours and fine grain."""
    rng, (width, height) = np.random.default_rng(seed), size
    soft = Image.fromarray(rng.integers(0, 256, (height // 64, width // 64, 3), dtype=np.uint8))
    grain = rng.normal(0, 6, (height, width, 3))
    pixels = np.asarray(soft.resize(size, Image.Resampling.BICUBIC)) + grain
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()
