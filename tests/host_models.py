"""Tiny random models of mlx-vlm's families, from its own config classes, and prompts for them.

Shapes: I images, N visual tokens of an image, D features.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_vlm_prune.hosts.prepared_inputs import PreparedInputs

from .host_kinds import CLIP as CLIP
from .host_kinds import END as END
from .host_kinds import IDS as IDS
from .host_kinds import IMAGE as IMAGE
from .host_kinds import QWEN as QWEN
from .host_kinds import QWEN2_5 as QWEN2_5
from .host_kinds import QWEN3 as QWEN3
from .host_kinds import QWEN3_TEXT as QWEN3_TEXT
from .host_kinds import SIGLIP as SIGLIP
from .host_kinds import START as START
from .host_kinds import TEXT as TEXT
from .host_kinds import VIDEO as VIDEO
from .host_kinds import VOCAB as VOCAB
from .host_kinds import WORDS as WORDS
from .host_kinds import (
    Kind,
    build,
    framed_prompt,
    mrope,
    noise,
    qwen_full,
    with_random_weights,
    with_words,
    without,
)  # fmt: skip
from .recent_host_models import RECENT


def llava(**sizes: int) -> Any:
    text = TEXT | {"model_type": "llama"} | sizes
    return build("llava", text, CLIP, image_token_index=IMAGE)


def qwen2_vl() -> Any:
    text = TEXT | {"model_type": "qwen2_vl", "rope_scaling": mrope([2, 3, 3])}
    vision = QWEN | {"embed_dim": 32, "hidden_size": 64}
    ids = {name: value for name, value in IDS.items() if name != "vision_end_token_id"}
    return build("qwen2_vl", text, vision, **ids)


def qwen2_5_vl() -> Any:
    text = TEXT | {"model_type": "qwen2_5_vl", "rope_scaling": mrope([2, 3, 3])}
    return build("qwen2_5_vl", text, QWEN | QWEN2_5, **IDS)


def qwen3_vl() -> Any:
    return build("qwen3_vl", QWEN3_TEXT, QWEN | QWEN3, **IDS)


def fastvlm() -> Any:
    home = import_module("mlx_vlm.models.fastvlm")
    vision = home.VisionConfig(projection_dim=16)
    for name, value in {"layers": [1, 1, 1, 1, 2], "embed_dims": [8, 16, 32, 64, 64]}.items():
        setattr(vision, name, value)
    text = home.TextConfig(model_type="qwen2", **{**TEXT, "tie_word_embeddings": True})
    config = home.ModelConfig(
        text_config=text, vision_config=vision, mm_hidden_size=128, model_type="fastvlm"
    )
    return with_random_weights(home.Model(config))


def llava_next() -> Any:
    model = build("llava_next", TEXT | {"model_type": "llama"}, CLIP, image_token_index=IMAGE)
    assert model.image_newline.shape == (64,)
    return model


def gemma3() -> Any:
    text = without(TEXT, "rope_theta") | {
        "model_type": "gemma3_text", "head_dim": 16, "mm_tokens_per_image": 4,
        "sliding_window_pattern": 2, "query_pre_attn_scalar": 16.0,
    }  # fmt: skip
    return build("gemma3", text, SIGLIP, image_token_index=IMAGE, hidden_size=64)


def paligemma() -> Any:
    text = TEXT | {"model_type": "gemma", "head_dim": 16, "use_bidirectional_attention": True}
    vision = SIGLIP | {"projection_dim": 64}
    return build("paligemma", text, vision, image_token_index=IMAGE, hidden_size=64)


def idefics3() -> Any:
    text = TEXT | {"model_type": "llama"}
    return build("idefics3", text, SIGLIP, image_token_id=IMAGE)


def smolvlm() -> Any:
    text = TEXT | {"model_type": "llama"}
    return build("smolvlm", text, SIGLIP, image_token_id=IMAGE)


def internvl_chat() -> Any:
    vision = without(CLIP, "projection_dim") | {"model_type": "intern_vit_6b"}
    text = TEXT | {"model_type": "qwen2"}
    return build("internvl_chat", text, vision, image_token_index=IMAGE)


def pixtral() -> Any:
    vision = CLIP | {"model_type": "pixtral", "head_dim": 16, "image_size": 112}
    text = TEXT | {"model_type": "mistral", "head_dim": 16}
    return build("pixtral", text, vision, image_token_index=IMAGE)


def square_prompt(model: Any, grids: list[tuple[int, int]]) -> PreparedInputs:
    """LLaVA's: all images of one size, placeholders without frames."""
    pixels = noise().normal(size=(len(grids), 3, 56, 56)).astype(np.float32)
    ids = with_words([[IMAGE] * (h * w) for h, w in grids])
    return PreparedInputs(ids, mx.ones((1, len(ids)), mx.int32), mx.array(pixels), len(grids))


def single_prompt(model: Any, grids: list[tuple[int, int]]) -> PreparedInputs:
    """FastVLM's: one placeholder for an image."""
    (h, w) = grids[0]
    pixels = noise().normal(size=(1, 3, 64 * h, 64 * w)).astype(np.float32)
    ids = with_words([[model.config.image_token_index]])
    return PreparedInputs(ids, mx.ones((1, len(ids)), mx.int32), mx.array(pixels), 1)


def tiled_prompt(model: Any, grids: list[tuple[int, int]]) -> PreparedInputs:
    """Idefics3's, InternVL's: (1, T, …) tiles; the first image is cut in two, the next is whole."""
    tiles = [2, 1][: len(grids) - 1]
    pixels = noise().normal(size=(1, sum(tiles), 3, 56, 56)).astype(np.float32)
    ids = with_words([[START, *([IMAGE] * 4 + [END]) * n] for n in tiles])
    mask = mx.ones((1, len(ids)), mx.int32)
    return PreparedInputs(ids, mask, mx.array(pixels), len(grids), {"num_patches_list": tiles})


def broken_prompt(model: Any, grids: list[tuple[int, int]]) -> PreparedInputs:
    """Pixtral's: a break after every row, pictures padded to the largest."""
    rows = []
    for h, w in grids:
        *broken, _ = ([IMAGE] * w + [START]) * h
        rows.append([*broken, END])
    ids, sizes = with_words(rows), [(14 * h, 14 * w) for h, w in grids]
    H, W = (max(sides) for sides in zip(*sizes, strict=True))
    pixels = noise().normal(size=(len(grids), 3, H, W)).astype(np.float32)
    extra = {"image_sizes": mx.array(sizes)}
    return PreparedInputs(
        ids, mx.ones((1, len(ids)), mx.int32), mx.array(pixels), len(grids), extra
    )


def leading_prompt(model: Any, grids: list[tuple[int, int]]) -> PreparedInputs:
    """PaliGemma's: the image stands first."""
    pixels = noise().normal(size=(1, 3, 56, 56)).astype(np.float32)
    ids = [IMAGE] * 16 + WORDS[2]
    return PreparedInputs(ids, mx.ones((1, len(ids)), mx.int32), mx.array(pixels), 1)


def cropped_prompt(model: Any, grids: list[tuple[int, int]]) -> PreparedInputs:
    """LLaVA-NeXT's: the crops of one image, and as many placeholders as its processor wants."""
    pixels = noise().normal(size=(1, 3, 3, 56, 56)).astype(np.float32)
    ids = with_words([[IMAGE] * 40])
    return PreparedInputs(ids, mx.ones((1, len(ids)), mx.int32), mx.array(pixels), 1)


def llava_full(model: Any, inputs: PreparedInputs) -> tuple[list[mx.array], list[list[mx.array]]]:
    """Embeddings of every image by the stock parts, (N, D) each."""
    *_, states = model.vision_tower(inputs.pixels.transpose(0, 2, 3, 1), output_hidden_states=True)
    return list(model.multi_modal_projector(states[model.vision_feature_layer][:, 1:])), []


def fastvlm_full(model: Any, inputs: PreparedInputs) -> tuple[list[mx.array], list[list[mx.array]]]:
    _, x_IHWC, _ = model.vision_tower(inputs.pixels.transpose(0, 2, 3, 1))
    return list(model.mm_projector(x_IHWC.flatten(1, 2))), []


def llava_next_full(
    model: Any, inputs: PreparedInputs
) -> tuple[list[mx.array], list[list[mx.array]]]:
    return llava_full(model, PreparedInputs(inputs.ids, inputs.mask_1L, inputs.pixels[0]))


def gemma_full(model: Any, inputs: PreparedInputs) -> tuple[list[mx.array], list[list[mx.array]]]:
    """As the words are scaled: by the square root of the size, which the language model undoes."""
    x, _, _ = model.vision_tower(inputs.pixels.transpose(0, 2, 3, 1), output_hidden_states=True)
    x = x[None] if x.ndim == 2 else x
    return list(model.multi_modal_projector(x) / 8), []


def idefics3_full(
    model: Any, inputs: PreparedInputs
) -> tuple[list[mx.array], list[list[mx.array]]]:
    pixels_THW3 = inputs.pixels[0].transpose(0, 2, 3, 1)
    mask_T44 = mx.ones((len(pixels_THW3), 4, 4), mx.bool_)
    x, *_ = model.vision_model(pixels_THW3, patch_attention_mask=mask_T44)
    return list(model.connector(x)), []


def internvl_full(
    model: Any, inputs: PreparedInputs
) -> tuple[list[mx.array], list[list[mx.array]]]:
    from mlx_vlm.models.base import pixel_shuffle

    pixels_THW3 = inputs.pixels[0].transpose(0, 2, 3, 1)
    x, *_ = model.vision_model(pixels_THW3, output_hidden_states=True)
    x = pixel_shuffle(x[:, 1:], shuffle_ratio=0.5)
    for layer in model.mlp1:
        x = layer(x)
    return list(x), []


def pixtral_full(model: Any, inputs: PreparedInputs) -> tuple[list[mx.array], list[list[mx.array]]]:
    """One image at a time: in a row they must not see one another."""
    parts = []
    for image, (h, w) in zip(inputs.pixels, inputs.extra["image_sizes"].tolist(), strict=True):
        alone_1HW3 = image[None, :, :h, :w].transpose(0, 2, 3, 1)
        x_1ND, _ = model.vision_tower(alone_1HW3)
        parts.append(model.multi_modal_projector(x_1ND)[0])
    return parts, []


TWO = [(4, 6), (6, 2)]  # two images of different shapes, wider and higher than a window
KINDS = {
    "llava": Kind(llava, [(4, 4)] * 2, square_prompt, llava_full),
    "qwen2_5_vl": Kind(qwen2_5_vl, TWO, framed_prompt, qwen_full),
    "qwen2_vl": Kind(qwen2_vl, TWO, framed_prompt, qwen_full),
    "qwen3_vl": Kind(qwen3_vl, TWO, framed_prompt, qwen_full),
    "fastvlm": Kind(fastvlm, [(4, 4)], single_prompt, fastvlm_full, (1,), "image"),
    "llava_next": Kind(llava_next, [(4, 4)] * 3, cropped_prompt, llava_next_full, (3,), "all"),
    "gemma3": Kind(gemma3, [(2, 2)] * 2, square_prompt, gemma_full),
    "idefics3": Kind(idefics3, [(2, 2)] * 3, tiled_prompt, idefics3_full, (2, 1)),
    "smolvlm": Kind(smolvlm, [(2, 2)] * 3, tiled_prompt, idefics3_full, (2, 1)),
    "paligemma": Kind(paligemma, [(4, 4)], leading_prompt, gemma_full, (1,)),
    "internvl_chat": Kind(internvl_chat, [(2, 2)] * 3, tiled_prompt, internvl_full, (2, 1)),
    "pixtral": Kind(pixtral, [(3, 5), (4, 2)], broken_prompt, pixtral_full),
    **RECENT,
}


def cached_models() -> Callable[[str], Any]:
    """A function from a family's name to its tiny model, which is made once."""
    models: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in models:
            models[name] = KINDS[name].make()
        return models[name]

    return get
