"""Tiny random models of mlx-vlm's families, from its own config classes, and prompts for them.

A prompt is `Inputs` as the family's processor would make them. `full` is what the stock model
makes of it, `positions` says by counting where every row stands.

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

from mlx_vlm_prune.hosts.views import Inputs

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
QWEN = dict(patch_size=14, depth=3, num_heads=2, spatial_merge_size=2, temporal_patch_size=2)
QWEN2_5 = dict(
    hidden_size=32, intermediate_size=48, out_hidden_size=64, window_size=56,
    fullatt_block_indexes=[2],
)  # fmt: skip
IDS = dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START,
           vision_end_token_id=END, vocab_size=VOCAB)  # fmt: skip


def llava() -> Any:
    return _made("llava", TEXT | {"model_type": "llama"}, CLIP, image_token_index=IMAGE)


def qwen2_vl() -> Any:
    text = TEXT | {"model_type": "qwen2_vl", "rope_scaling": _mrope([2, 3, 3])}
    vision = QWEN | {"embed_dim": 32, "hidden_size": 64}
    own = {name: value for name, value in IDS.items() if name != "vision_end_token_id"}
    return _made("qwen2_vl", text, vision, **own)


def qwen2_5_vl() -> Any:
    text = TEXT | {"model_type": "qwen2_5_vl", "rope_scaling": _mrope([2, 3, 3])}
    return _made("qwen2_5_vl", text, QWEN | QWEN2_5, **IDS)


def qwen3_vl() -> Any:
    text = TEXT | {"model_type": "qwen3_vl", "head_dim": 16, "rope_scaling": _mrope([4, 2, 2])}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64}
    vision = QWEN | sizes | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    return _made("qwen3_vl", text, vision, **IDS)


def fastvlm() -> Any:
    home = import_module("mlx_vlm.models.fastvlm")
    vision = home.VisionConfig(projection_dim=16)
    for name, value in {"layers": [1, 1, 1, 1, 2], "embed_dims": [8, 16, 32, 64, 64]}.items():
        setattr(vision, name, value)
    text = home.TextConfig(model_type="qwen2", **{**TEXT, "tie_word_embeddings": True})
    config = home.ModelConfig(
        text_config=text, vision_config=vision, mm_hidden_size=128, model_type="fastvlm"
    )
    return _ready(home.Model(config))


def _mrope(section: list[int]) -> dict[str, Any]:
    return {"type": "mrope", "mrope_section": section}


def _made(name: str, text: dict, vision: dict, **own: Any) -> Any:
    home = import_module(f"mlx_vlm.models.{name}")
    config = home.ModelConfig(
        text_config=home.TextConfig(**text), vision_config=home.VisionConfig(**vision),
        model_type=name, **own,
    )  # fmt: skip
    return _ready(home.Model(config))


def _ready(model: Any) -> Any:
    """Every weight drawn anew, so that neither norms nor biases are trivial."""
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
    grids: list[tuple[int, int]]  # of visual tokens, one image after another
    prompt: Callable[[Any, list[tuple[int, int]]], Inputs]
    full: Callable[[Any, Inputs], tuple[list[mx.array], list[list[mx.array]]]]


def _rng() -> np.random.Generator:
    return np.random.default_rng(7)


def square_prompt(model: Any, grids: list[tuple[int, int]]) -> Inputs:
    """LLaVA's: all images of one size, placeholders without frames."""
    pixels = _rng().normal(size=(len(grids), 3, 56, 56)).astype(np.float32)
    ids = _ids([[IMAGE] * (h * w) for h, w in grids])
    return Inputs(ids, mx.ones((1, len(ids)), mx.int32), mx.array(pixels), len(grids))


def framed_prompt(model: Any, grids: list[tuple[int, int]]) -> Inputs:
    """Qwen's: images of any shape, a start and an end around each."""
    ids = _ids([[START, *[IMAGE] * (h * w), END] for h, w in grids])
    thw = mx.array([[1, 2 * h, 2 * w] for h, w in grids])
    patches = sum(4 * h * w for h, w in grids)
    pixels = mx.array(_rng().normal(size=(patches, 3 * 2 * 14 * 14)).astype(np.float32))
    extra = {"image_grid_thw": thw}
    return Inputs(ids, mx.ones((1, len(ids)), mx.int32), pixels, len(grids), extra)


def single_prompt(model: Any, grids: list[tuple[int, int]]) -> Inputs:
    """FastVLM's: one placeholder for an image."""
    (h, w) = grids[0]
    pixels = _rng().normal(size=(1, 3, 64 * h, 64 * w)).astype(np.float32)
    ids = _ids([[model.config.image_token_index]])
    return Inputs(ids, mx.ones((1, len(ids)), mx.int32), mx.array(pixels), 1)


def _ids(images: list[list[int]]) -> list[int]:
    ids = list(WORDS[0])
    for i, image in enumerate(images):
        ids += (WORDS[1] if i else []) + image
    return ids + WORDS[2]


def llava_full(model: Any, inputs: Inputs) -> tuple[list[mx.array], list[list[mx.array]]]:
    """Embeddings of every image by the stock parts, (N, D) each."""
    *_, states = model.vision_tower(inputs.pixels.transpose(0, 2, 3, 1), output_hidden_states=True)
    return list(model.multi_modal_projector(states[model.vision_feature_layer][:, 1:])), []


def qwen_full(model: Any, inputs: Inputs) -> tuple[list[mx.array], list[list[mx.array]]]:
    """The same, and what DeepStack adds, layer by layer for each image."""
    thw = inputs.extra["image_grid_thw"]
    out = model.vision_tower(inputs.pixels, thw)
    x_UD, deep = out if isinstance(out, tuple) else (out, [])
    ends = np.cumsum([h * w // 4 for _, h, w in thw.tolist()]).tolist()
    parts = list(zip([0, *ends], ends, strict=False))
    return [x_UD[a:b] for a, b in parts], [[y[a:b] for y in deep] for a, b in parts if deep]


def fastvlm_full(model: Any, inputs: Inputs) -> tuple[list[mx.array], list[list[mx.array]]]:
    _, x_IHWC, _ = model.vision_tower(inputs.pixels.transpose(0, 2, 3, 1))
    return list(model.mm_projector(x_IHWC.flatten(1, 2))), []


TWO = [(4, 6), (6, 2)]  # two images of different shapes, wider and higher than a window
KINDS = {
    "llava": Kind(llava, [(4, 4)] * 2, square_prompt, llava_full),
    "qwen2_5_vl": Kind(qwen2_5_vl, TWO, framed_prompt, qwen_full),
    "qwen2_vl": Kind(qwen2_vl, TWO, framed_prompt, qwen_full),
    "qwen3_vl": Kind(qwen3_vl, TWO, framed_prompt, qwen_full),
    "fastvlm": Kind(fastvlm, [(4, 4)], single_prompt, fastvlm_full),
}
