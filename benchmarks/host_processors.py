"""Processors for models of mlx-vlm's with random weights: few words, pictures as in the family."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from mlx_vlm_prune.hosts.llava_processor import mend

from .hosts import END, IMAGE, PATCH, SIZES, START, VIDEO

PAD, UNKNOWN, EOS = 0, 1, 2
FIRST_WORD = 10
MARKS = {
    "llava": {"<image>": IMAGE},
    "qwen2_5_vl": {
        "<|vision_start|>": START, "<|image_pad|>": IMAGE, "<|vision_end|>": END,
        "<|video_pad|>": VIDEO,
    },
}  # fmt: skip
IN_TEMPLATE = {
    "llava": "<image>", "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
}  # fmt: skip
HALF = [0.5, 0.5, 0.5]


def processor_of(family: str, size: str, words: list[str]) -> Any:
    """The processor of a family's model of a size of `benchmarks.hosts`, as mlx-vlm loads it."""
    from mlx_vlm.utils import load_processor

    side = PATCH * SIZES[size].side
    with TemporaryDirectory() as name:
        folder = Path(name)
        for file, content in files_of(family, side).items():
            (folder / file).write_text(json.dumps(content), encoding="utf-8")
        tokenizer_of(family, words).save(str(folder / "tokenizer.json"))
        processor = load_processor(folder, True, eos_token_ids=[EOS])
    if family == "llava":
        mend(processor)
    return processor


def files_of(family: str, side: int) -> dict[str, dict[str, Any]]:
    """The JSON files of a processor; LLaVA's pictures are squares of `side` pixels, Qwen's become
    up to four times as many, for as many visual tokens."""
    normalised = {"image_mean": HALF, "image_std": HALF}
    part = "{% if part.type == 'image' %}" + IN_TEMPLATE[family]
    part += "{% else %} {{ part.text }}{% endif %}"
    listed = "{% for part in m.content %}" + part + "{% endfor %}"
    content = "{% if m.content is string %}{{ m.content }}{% else %}" + listed + "{% endif %}"
    files: dict[str, dict[str, Any]] = {
        "config.json": {"model_type": family},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>",
            "pad_token": "<pad>", "unk_token": "<unk>",
            "chat_template": "{% for m in messages %}" + content + "{% endfor %} answer",
        },
    }  # fmt: skip
    if family == "llava":
        files["preprocessor_config.json"] = normalised | {
            "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": side},
            "crop_size": {"height": side, "width": side}, "resample": 3,
        }  # fmt: skip
        files["processor_config.json"] = {
            "patch_size": PATCH, "num_additional_image_tokens": 1, "image_token": "<image>",
            "vision_feature_select_strategy": "default",
        }  # fmt: skip
    else:
        files["preprocessor_config.json"] = normalised | {
            "image_processor_type": "Qwen2VLImageProcessor", "patch_size": PATCH, "merge_size": 2,
            "temporal_patch_size": 2, "min_pixels": (4 * PATCH) ** 2, "max_pixels": (2 * side) ** 2,
        }  # fmt: skip
    return files


def tokenizer_of(family: str, words: list[str]) -> Tokenizer:
    """One id a word."""
    special = {"<pad>": PAD, "<unk>": UNKNOWN, "<eos>": EOS, **MARKS[family]}
    known = dict.fromkeys([*words, "answer"])
    ids = special | {word: FIRST_WORD + i for i, word in enumerate(known)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(
        [AddedToken(word, special=True, normalized=False) for word in special]
    )
    return tokenizer
