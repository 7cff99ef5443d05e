"""Tiny random models of the families of 2026: mostly recurrent ones, and Gemma 4.

Shapes: I images, T views, P patches, N visual tokens of a view, D features.
"""

from typing import Any

import mlx.core as mx
import numpy as np

from mlx_vlm_prune.hosts.prepared_inputs import PreparedInputs

from .host_kinds import (
    END,
    IDS,
    IMAGE,
    QWEN,
    QWEN3,
    SIGLIP,
    START,
    TEXT,
    VOCAB,
    Kind,
    build,
    framed_prompt,
    noise,
    qwen_full,
    with_words,
    without,
)  # fmt: skip

HYBRID = without(TEXT, "rope_theta") | {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "linear_conv_kernel_dim": 4, "head_dim": 32,
    "full_attention_interval": 2,
    "rope_parameters": {
        "type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4,
        "partial_rotary_factor": 0.25,
    },
}  # fmt: skip
EXPERTS = {
    "num_experts": 4, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 48,
    "moe_intermediate_size": 32,
}  # fmt: skip
GEMMA4 = without(TEXT, "rope_theta") | {
    "num_hidden_layers": 4, "head_dim": 16, "global_head_dim": 32, "vocab_size_per_layer_input": 64,
    "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 8,
    "rope_parameters": {
        "full_attention": {
            "partial_rotary_factor": 0.25, "rope_theta": 1e6, "rope_type": "proportional",
        },
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
    },
}  # fmt: skip
GEMMA4_VISION = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, head_dim=16, global_head_dim=16, patch_size=4,
    position_embedding_size=32, standardize=True,
)  # fmt: skip
LFM2 = dict(
    hidden_size=64, num_hidden_layers=3, intermediate_size=96, num_attention_heads=4,
    num_key_value_heads=2, norm_eps=1e-6, vocab_size=VOCAB, max_position_embeddings=512,
    rope_theta=1e4, block_dim=64, block_ff_dim=96, block_multiple_of=8, conv_dim=64,
    conv_dim_out=64, layer_types=["conv", "full_attention", "conv"],
)  # fmt: skip
LFM2_VISION = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
    patch_size=14, num_patches=16,
)  # fmt: skip


def qwen3_5() -> Any:
    vision = QWEN | QWEN3 | {"deepstack_visual_indexes": []}
    return build("qwen3_5", HYBRID | {"model_type": "qwen3_5_text"}, vision, **IDS)


def qwen3_5_moe() -> Any:
    text = without(HYBRID, "intermediate_size") | EXPERTS | {"model_type": "qwen3_5_moe_text"}
    vision = QWEN | QWEN3 | {"deepstack_visual_indexes": []}
    return build("qwen3_5_moe", text, vision, **IDS)


def gemma4(**settings: Any) -> Any:
    text = GEMMA4 | settings
    return build("gemma4", text, GEMMA4_VISION, image_token_id=IMAGE, hidden_size=64)


def lfm2_vl() -> Any:
    options = {"image_token_id": IMAGE, "projector_hidden_size": 48}
    return build("lfm2_vl", LFM2, LFM2_VISION, **options)


def gemma4_prompt(model: Any, grids: list[tuple[int, int]]) -> PreparedInputs:
    """Pictures of one shape, and which rows are theirs."""
    (h, w), *_ = grids
    pixels = mx.array(noise().uniform(size=(len(grids), 3, 12 * h, 12 * w)).astype(np.float32))
    ids = with_words([[START, *[IMAGE] * (h * w), END] for h, w in grids])
    extra = {"mm_token_type_ids": mx.array([[int(token == IMAGE) for token in ids]])}
    return PreparedInputs(ids, mx.ones((1, len(ids)), mx.int32), pixels, len(grids), extra)


def lfm2_prompt(model: Any, grids: list[tuple[int, int]]) -> PreparedInputs:
    """Views of patches with padding; the first image is cut in two, the next is whole."""
    tiles = [2, 1][: len(grids) - 1]
    shapes, P = [[2 * h, 2 * w] for h, w in grids], 16
    pixels = noise().normal(size=(len(grids), P, 3 * 14 * 14)).astype(np.float32)
    is_real = np.arange(P) < np.prod(shapes, axis=1)[:, None]
    runs = iter([[IMAGE] * (h * w) for h, w in grids])
    ids = with_words(
        [[START, *[x for _ in range(n) for x in (7, *next(runs))], END] for n in tiles]
    )
    extra = {
        "spatial_shapes": mx.array(shapes), "pixel_attention_mask": mx.array(is_real, mx.int32),
        "num_patches_list": tiles,
    }  # fmt: skip
    mask = mx.ones((1, len(ids)), mx.int32)
    return PreparedInputs(ids, mask, mx.array(pixels), len(tiles), extra)


def gemma4_full(model: Any, inputs: PreparedInputs) -> tuple[list[mx.array], list[list[mx.array]]]:
    pixels = inputs.pixels
    alone = [each[None] for each in pixels]
    return [model.embed_vision(model.vision_tower(each))[0] for each in alone], []


def lfm2_full(model: Any, inputs: PreparedInputs) -> tuple[list[mx.array], list[list[mx.array]]]:
    return model.encode_images(inputs.pixels, **inputs.extra), []


def llava_onevision() -> Any:
    pinpoints = [[56, 56], [56, 112], [112, 56], [112, 112]]
    options = {"image_token_index": IMAGE, "image_grid_pinpoints": pinpoints}
    return build("llava_onevision", TEXT, SIGLIP, **options)


def mosaic_prompt(model: Any, grids: list[tuple[int, int]]) -> PreparedInputs:
    """LLaVA-OneVision's: a picture of each image and its tiles, of which the mosaic loses a margin;
    one image is higher than wide."""
    sizes, tiles = [[90, 56], [56, 56]][: len(grids) // 2], [2, 1]
    pixels = noise().normal(size=(len(sizes), 3, 3, 56, 56)).astype(np.float32)
    runs = [[IMAGE] * (16 + h * (w + 1)) for h, w in grids[1::2]]
    for image, n in zip(pixels, tiles, strict=False):
        image[1 + n :] = 0
    ids = with_words(runs)
    mask = mx.ones((1, len(ids)), mx.int32)
    extra = {"image_sizes": mx.array(sizes)}
    return PreparedInputs(ids, mask, mx.array(pixels), len(sizes), extra)


def onevision_full(
    model: Any, inputs: PreparedInputs
) -> tuple[list[mx.array], list[list[mx.array]]]:
    """Of each image the picture, and the mosaic without its new lines."""
    x_UD = model.get_image_features(inputs.pixels, inputs.extra["image_sizes"])
    parts, begin = [], 0
    for h, w in RECENT["llava_onevision"].grids[1 : 2 * inputs.images : 2]:
        end = begin + 16 + h * (w + 1)
        mosaic = x_UD[begin + 16 : end].reshape(h, w + 1, -1)[:, :w].flatten(0, 1)
        parts, begin = [*parts, x_UD[begin : begin + 16], mosaic], end
    return parts, []


TWO = [(4, 6), (6, 2)]
RECENT = {
    "qwen3_5": Kind(qwen3_5, TWO, framed_prompt, qwen_full),
    "qwen3_5_moe": Kind(qwen3_5_moe, TWO, framed_prompt, qwen_full),
    "gemma4": Kind(gemma4, [(2, 3)] * 2, gemma4_prompt, gemma4_full),
    "llava_onevision": Kind(
        llava_onevision,
        [(4, 4), (6, 4), (4, 4), (4, 4)],
        mosaic_prompt,
        onevision_full,
        (2, 2),
        breaks=(0, 6, 0, 4),
    ),
    "lfm2_vl": Kind(lfm2_vl, [(2, 2), (2, 2), (1, 3)], lfm2_prompt, lfm2_full, (2, 1)),
}
