"""Tiny mlx-vlm checkpoints on disk: random weights, a tokenizer of 64 words, a preprocessor."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from . import host_models as tiny

MARKS = {
    "llava": "<image>", "qwen": "<|vision_start|><|image_pad|><|vision_end|>", "smolvlm": "<image>",
}  # fmt: skip
TOKENS = {
    "llava": {"<image>": tiny.IMAGE},
    "qwen": {
        "<|video_pad|>": tiny.VIDEO, "<|image_pad|>": tiny.IMAGE,
        "<|vision_start|>": tiny.START, "<|vision_end|>": tiny.END,
    },
    "smolvlm": {
        "<global-img>": tiny.VIDEO, "<image>": tiny.IMAGE,
        "<fake_token_around_image>": tiny.START, "<end_of_utterance>": tiny.END,
    },
}  # fmt: skip
EOS = 63
HALF = [0.5, 0.5, 0.5]
PICTURE = {
    "llava": {
        "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 56},
        "crop_size": {"height": 56, "width": 56}, "resample": 3,
    },
    "qwen": {
        "image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14, "merge_size": 2,
        "temporal_patch_size": 2, "min_pixels": 56**2, "max_pixels": 64 * 28**2,
    },
    "smolvlm": {  # what is wider or higher than a tile is cut up
        "image_processor_type": "SmolVLMImageProcessor", "size": {"longest_edge": 112},
        "max_image_size": {"longest_edge": 56},
    },
}  # fmt: skip
PROCESSOR = {
    "llava": {
        "patch_size": 14, "num_additional_image_tokens": 1, "image_token": "<image>",
        "vision_feature_select_strategy": "default",
    },
    "smolvlm": {"image_seq_len": 4},
}  # fmt: skip


def checkpoint(name: str, folder: Path) -> Path:
    """FOLDER/NAME as mlx-vlm reads it."""
    home = folder / name
    home.mkdir(parents=True)
    model = getattr(tiny, name)()
    weights: Any = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(home / "model.safetensors"), weights, metadata={"format": "mlx"})
    normalised = {"image_mean": HALF, "image_std": HALF}
    _write(home / "config.json", _config(name))
    _write(home / "preprocessor_config.json", PICTURE[_kind(name)] | normalised)
    if name in PROCESSOR:
        _write(home / "processor_config.json", PROCESSOR[name])
    _words(home, name)
    return home


def picture(folder: Path, name: str, height: int, width: int) -> Path:
    noise = np.random.default_rng(height).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / name)
    return folder / name


def _config(name: str) -> dict[str, Any]:
    if name == "llava":
        text = tiny.TEXT | {"model_type": "llama"}
        config = {"text_config": text, "vision_config": tiny.CLIP, "image_token_index": tiny.IMAGE}
        return config | {"model_type": name, "vision_feature_layer": -2, "eos_token_id": EOS}
    if name == "smolvlm":
        parts = {"text_config": tiny.TEXT | {"model_type": "llama"}, "vision_config": tiny.SIGLIP}
        return parts | {"model_type": name, "image_token_id": tiny.IMAGE, "eos_token_id": EOS}
    shared = tiny.IDS | {"model_type": name, "eos_token_id": EOS}
    if name == "qwen3_vl":
        vision = tiny.QWEN | tiny.QWEN3 | {"model_type": name}
        return shared | {"text_config": tiny.QWEN3_TEXT, "vision_config": vision}
    text = tiny.TEXT | {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    return text | shared | {"vision_config": tiny.QWEN | tiny.QWEN2_5 | {"model_type": name}}


def _kind(name: str) -> str:
    return name.partition("2")[0].partition("3")[0]


def _words(home: Path, name: str) -> None:
    marks = TOKENS[_kind(name)]
    special = {"<pad>": 0, "<eos>": EOS, "<unk>": 2}
    words = special | {f"w{i}": i for i in (1, *range(3, 59))} | marks
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(w, special=True, normalized=False)
                             for w in (*special, *marks)])  # fmt: skip
    tokenizer.save(str(home / "tokenizer.json"))
    part = (
        "{% if part.type == 'image' %}"
        + MARKS[_kind(name)]
        + "{% elif part.type == 'video' %}"
        + MARKS["qwen"].replace("image", "video")
        + "{% else %} {{ part.text }}{% endif %}"
    )
    listed = "{% for part in m.content %}" + part + "{% endfor %}"
    content = "{% if m.content is string %}{{ m.content }}{% else %}" + listed + "{% endif %}"
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "pad_token": "<pad>",
        "unk_token": "<unk>", "chat_template": "{% for m in messages %}" + content
        + "{% endfor %} w5",
    }  # fmt: skip
    _write(home / "tokenizer_config.json", config)


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content), encoding="utf-8")


def desk(folder: Path, names: Iterable[str]) -> Path:
    """The folder, with a tiny checkpoint of each family and two pictures."""
    for name in names:
        checkpoint(name, folder)
    picture(folder, "a.png", 80, 90)
    picture(folder, "b.png", 120, 60)
    return folder
