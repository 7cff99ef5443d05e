"""A folder of each family that mlx-vlm's own command line loads: a tiny model, with its processor.

The words are `host_folders`'; tokens and settings of a family are what its processor asks for.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from . import host_folders, into_folders
from .host_models import END, IMAGE, START, VIDEO

SQUARE = {"height": 56, "width": 56}
CROPPED = {"size": {"shortest_edge": 56}, "crop_size": SQUARE}
SMALL_TILES = [[56, 112], [112, 56], [112, 112]]
# Of each family: what marks an image in a prompt, its tokens, its image processor's settings, and
# further files.
QWEN = (host_folders.MARKS["qwen"], host_folders.TOKENS["qwen"], host_folders.PICTURE["qwen"], {})
TILED_WORDS = host_folders.TOKENS["smolvlm"] | {
    f"<row_{row}_col_{column}>": 40 + 2 * row + column for row in (1, 2) for column in (1, 2)
}
TILES = {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 56}}
FAMILIES: dict[str, tuple[str, dict[str, int], dict[str, Any], dict[str, Any]]] = {
    "llava": (
        "<image>", {"<image>": IMAGE}, host_folders.PICTURE["llava"],
        {"processor_config.json": host_folders.PROCESSOR["llava"]},
    ),
    "llava_next": (
        "<image>", {"<image>": IMAGE},
        CROPPED | {
            "image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": SMALL_TILES,
        },
        {"processor_config.json": host_folders.PROCESSOR["llava"]},
    ),
    "qwen2_vl": QWEN,
    "qwen2_5_vl": QWEN,
    "qwen3_vl": QWEN,
    "llava_qwen2": (
        "<image>", {}, {"size": {"shortest_edge": 256}, "crop_size": {"height": 256, "width": 256}},
        {},
    ),
    "gemma3": (
        "<start_of_image>",
        {"<image_soft_token>": IMAGE, "<start_of_image>": START, "<end_of_image>": END},
        {"image_processor_type": "Gemma3ImageProcessor", "size": SQUARE},
        {"processor_config.json": {"image_seq_length": 4}},
    ),
    "idefics3": (
        "<image>", TILED_WORDS, TILES | {"image_processor_type": "Idefics3ImageProcessor"},
        {"processor_config.json": {"image_seq_len": 4}},
    ),
    "smolvlm": (
        "<image>", TILED_WORDS, TILES | {"image_processor_type": "SmolVLMImageProcessor"},
        {"processor_config.json": {"image_seq_len": 4}},
    ),
    "paligemma": (
        "<image>", {"<image>": IMAGE},
        {"image_processor_type": "SiglipImageProcessor", "size": SQUARE, "image_seq_length": 16},
        {},
    ),
    "internvl_chat": (
        "<image>", {"<IMG_CONTEXT>": IMAGE, "<img>": START, "</img>": END}, {}, {},
    ),
    "pixtral": (
        "[IMG]", {"[IMG]": IMAGE, "[IMG_BREAK]": START, "[IMG_END]": END},
        {"image_processor_type": "PixtralImageProcessor", "size": {"longest_edge": 112},
         "patch_size": {"height": 14, "width": 14}},
        {"processor_config.json": {"patch_size": 14}},
    ),
    "qwen3_5": QWEN,
    "qwen3_5_moe": QWEN,
    "gemma4": (
        "<|image|>",
        {"<|image|>": IMAGE, "<|image>": START, "<image|>": END, "<|video|>": VIDEO},
        {"patch_size": 4, "max_soft_tokens": 6, "pooling_kernel_size": 3}, {},
    ),
    "llava_onevision": (
        "<image>", {"<image>": IMAGE, "<video>": VIDEO},
        {"image_processor_type": "LlavaOnevisionImageProcessor", "size": SQUARE,
         "image_grid_pinpoints": [[56, 56], *SMALL_TILES]},
        {"processor_config.json": {
            "num_image_tokens": 16, "vision_feature_select_strategy": "full"}},
    ),
    "lfm2_vl": (
        "<image>", {"<image>": IMAGE, "<|image_start|>": START, "<|image_end|>": END},
        {"patch_size": 14, "tile_size": 112, "min_image_tokens": 4, "max_image_tokens": 6}, {},
    ),
}  # fmt: skip
# What transformers calls tokens of a family.
CALLED = {
    "gemma3": {
        "image_token": "<image_soft_token>", "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
    },
    "gemma4": {
        "image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>",
    },
}  # fmt: skip


# What transformers wants to be whole numbers.
WHOLE: dict[str, dict[str, dict[str, int]]] = {
    "qwen2_vl": {"vision_config": {"mlp_ratio": 4}},
    "gemma3": {"text_config": {"query_pre_attn_scalar": 16}},
}


def checkpoint(family: str, home: Path) -> Path:
    """HOME/FAMILY."""
    kind = {"llava_qwen2": "fastvlm"}.get(family, family)
    folder = into_folders.checkpoint(kind, home)
    folder = folder.rename(home / family)
    mark, marks, picture, files = FAMILIES[family]
    config = json.loads((folder / "config.json").read_text())
    for name, value in WHOLE.get(family, {}).items():
        config[name] |= value
    config |= {"model_type": family, "eos_token_id": host_folders.EOS}
    picture = {"image_mean": host_folders.HALF, "image_std": host_folders.HALF, **picture}
    words = write_words(folder, marks, mark, CALLED.get(family, {}))
    everything = {"config.json": config, "preprocessor_config.json": picture}
    for name, content in {**everything, "tokenizer_config.json": words, **files}.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder


def write_words(
    folder: Path, marks: dict[str, int], mark: str, called: dict[str, str]
) -> dict[str, Any]:
    """tokenizer.json, and what tokenizer_config.json says of it."""
    special = {"<bos>": 1, "<pad>": 0, "<eos>": host_folders.EOS, "<unk>": 2, **marks}
    plain = {f"w{i}": i for i in range(3, VIDEO) if i not in special.values()}
    tokenizer = Tokenizer(models.WordLevel({**plain, **special}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(
        [AddedToken(word, special=True, normalized=False) for word in special]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    text = "{{ part.text or part.content }}"
    part = "{% if part.type == 'image' %}" + mark + "{% else %} " + text + "{% endif %}"
    parts = "{% for part in m.content %}" + part + "{% endfor %}"
    content = "{% if m.content is string %}{{ m.content }}{% else %}" + parts + "{% endif %}"
    return {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>",
        "pad_token": "<pad>", "unk_token": "<unk>", "extra_special_tokens": called,
        "chat_template": "{% for m in messages %}" + content + "{% endfor %} w5",
    }  # fmt: skip
