"""What tiny models of mlx-vlm's families are made of, and how a family is tested.

A prompt is `PreparedInputs` as the processor of the family makes them. `full` is what the stock
model makes of it, `positions` counts where every row stands.

Shapes: I images, N visual tokens of an image, L rows, D features.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map

from mlx_vlm_prune.hosts.prepared_inputs import PreparedInputs

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")

VOCAB, IMAGE, VIDEO, START, END = 64, 60, 59, 61, 62
WORDS = ([3, 9, 4], [7, 11], [5, 8, 2, 30])  # before, between and after the images
TEXT = dict(
    hidden_size=64, num_hidden_layers=3, intermediate_size=96, num_attention_heads=4,
    num_key_value_heads=2, rms_norm_eps=1e-6, vocab_size=VOCAB, max_position_embeddings=512,
    rope_theta=1e4,
)  # fmt: skip
CLIP = dict(
    model_type="clip_vision_model", hidden_size=32, num_hidden_layers=4, intermediate_size=48,
    num_attention_heads=2, image_size=56, patch_size=14, projection_dim=16,
)  # fmt: skip
SIGLIP = dict(
    model_type="siglip_vision_model", hidden_size=32, num_hidden_layers=3, intermediate_size=48,
    num_attention_heads=2, image_size=56, patch_size=14,
)  # fmt: skip
QWEN = dict(patch_size=14, depth=3, num_heads=2, spatial_merge_size=2, temporal_patch_size=2)
QWEN2_5 = dict(
    hidden_size=32, intermediate_size=48, out_hidden_size=64, window_size=56,
    fullatt_block_indexes=[2],
)  # fmt: skip
QWEN3 = dict(
    hidden_size=32, intermediate_size=48, out_hidden_size=64, num_position_embeddings=64,
    deepstack_visual_indexes=[0, 1],
)  # fmt: skip
QWEN3_TEXT = TEXT | {
    "model_type": "qwen3_vl", "head_dim": 16,
    "rope_scaling": {"type": "mrope", "mrope_section": [4, 2, 2]},
}  # fmt: skip
IDS = dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START,
           vision_end_token_id=END, vocab_size=VOCAB)  # fmt: skip


def without(config: dict, name: str) -> dict:
    return {key: value for key, value in config.items() if key != name}


def mrope(section: list[int]) -> dict[str, Any]:
    return {"type": "mrope", "mrope_section": section}


def build(name: str, text: dict, vision: dict, **options: Any) -> Any:
    home = import_module(f"mlx_vlm.models.{name}")
    config = home.ModelConfig(
        text_config=home.TextConfig(**text), vision_config=home.VisionConfig(**vision),
        model_type=name, **options,
    )  # fmt: skip
    return with_random_weights(home.Model(config))


def with_random_weights(model: Any) -> Any:
    """Every weight drawn again, so that neither norms nor biases are trivial."""
    rng = np.random.default_rng(0)

    def drawn(a: mx.array) -> mx.array:
        scale = 0.1 if a.ndim == 1 else 1 / np.sqrt(np.prod(a.shape[1:]))
        return mx.array(rng.normal(0, scale, a.shape).astype(np.float32)) + 1.0 * (a.ndim == 1)

    model.update(tree_map(drawn, model.parameters()))
    model.eval()
    return model


@dataclass(frozen=True)
class Kind:
    """A family under test."""

    make: Callable[[], Any]
    grids: list[tuple[int, int]]  # of visual tokens, one picture after another
    prompt: Callable[[Any, list[tuple[int, int]]], PreparedInputs]
    full: Callable[[Any, PreparedInputs], tuple[list[mx.array], list[list[mx.array]]]]
    tiles: tuple[int, ...] = (1, 1)  # pictures of each image
    marks: str = "token"  # what a placeholder stands for
    breaks: tuple[int, ...] = ()  # of each picture: new lines among its placeholders

    def inputs(self, model: Any, images: int | None = None) -> PreparedInputs:
        """A prompt with so many images, or all there are."""
        return self.prompt(model, self.grids[: sum(self.tiles[:images])])


def noise() -> np.random.Generator:
    return np.random.default_rng(7)


def framed_prompt(model: Any, grids: list[tuple[int, int]]) -> PreparedInputs:
    """Qwen's: images of any shape, a start and an end around each."""
    ids = with_words([[START, *[IMAGE] * (h * w), END] for h, w in grids])
    thw = mx.array([[1, 2 * h, 2 * w] for h, w in grids])
    patches = sum(4 * h * w for h, w in grids)
    pixels = mx.array(noise().normal(size=(patches, 3 * 2 * 14 * 14)).astype(np.float32))
    extra = {"image_grid_thw": thw}
    return PreparedInputs(ids, mx.ones((1, len(ids)), mx.int32), pixels, len(grids), extra)


def with_words(images: list[list[int]]) -> list[int]:
    ids = list(WORDS[0])
    for i, image in enumerate(images):
        ids += (WORDS[1] if i else []) + image
    return ids + WORDS[2]


def qwen_full(model: Any, inputs: PreparedInputs) -> tuple[list[mx.array], list[list[mx.array]]]:
    """The same, and what DeepStack adds, layer by layer for each image."""
    thw = inputs.extra["image_grid_thw"]
    out = model.vision_tower(inputs.pixels, thw)
    x_UD, deep = out if isinstance(out, tuple) else (out, [])
    ends = np.cumsum([h * w // 4 for _, h, w in thw.tolist()]).tolist()
    parts = list(zip([0, *ends], ends, strict=False))
    return [x_UD[a:b] for a, b in parts], [[y[a:b] for y in deep] for a, b in parts if deep]
