"""Random models in folders that `mlx-vlm-prune serve` reads: a LLaVA and a Qwen2.5-VL.

Times do not depend on the values of weights, so weights are random.
"""

import json
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from mlx_vlm_prune.checkpoints.config import CONFIG, parse_sizes
from mlx_vlm_prune.checkpoints.llava.layouts import LAYOUTS
from mlx_vlm_prune.checkpoints.llava.sizes import text_config, vision_config
from mlx_vlm_prune.checkpoints.names.rules import to_published
from mlx_vlm_prune.checkpoints.processor import TOKENIZER, TOKENIZER_CONFIG
from mlx_vlm_prune.checkpoints.shapes import expected_shapes
from mlx_vlm_prune.scenes.vocabulary import words
from mlx_vlm_prune.scenes.vocabulary import write as write_words

from .hosts import END, IMAGE, PATCH, START, VIDEO, VOCAB, Size, qwen2_5_vl_config, qwen2_5_vl_model

LAYOUT, PREPROCESSOR, WEIGHTS = "llava-hf", "preprocessor_config.json", "model.safetensors"
SPECIAL = {
    "<pad>": 0, "<unk>": 2, "<eos>": 3, "<|image_pad|>": IMAGE, "<|vision_start|>": START,
    "<|vision_end|>": END, "<|video_pad|>": VIDEO,
}  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{% if m.content is string %} {{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %} {{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %} w9"
)


def write_llava(folder: Path, size: Size) -> None:
    """A LLaVA as transformers writes it, for our decoder, with the scenes' words."""
    (layers, D), (depth, width), side = size.language, size.tower, PATCH * size.side
    config = {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava",
        "image_token_index": words().index("@"), "projector_hidden_act": "gelu",
        "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
        "text_config": {
            "model_type": "llama", "hidden_size": D, "intermediate_size": 3 * D,
            "num_hidden_layers": layers, "num_attention_heads": D // 32,
            "num_key_value_heads": D // 64, "vocab_size": len(words()),
            "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
        },
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": width, "num_hidden_layers": depth,
            "intermediate_size": 4 * width, "num_attention_heads": width // 32,
            "image_size": side, "patch_size": PATCH, "projection_dim": width,
        },
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / CONFIG, config)
    mx.save_safetensors(str(folder / WEIGHTS), _llava_weights(config, folder), {"format": "pt"})
    write_words(folder)
    _write(folder / PREPROCESSOR, {"size": {"shortest_edge": side}, "crop_size": side})


def _llava_weights(config: dict[str, Any], folder: Path) -> dict[str, mx.array]:
    """Random weights by their published names."""
    text = text_config(config["text_config"], config, folder)
    sizes = {
        "text_config": text, "vision_config": vision_config(config, folder),
        "projector": {"merge": [1, 1], "norm": False},
    }  # fmt: skip
    table, weights = LAYOUTS[LAYOUT].table(True, text), {}
    for ours, shape in expected_shapes(parse_sizes(sizes, folder)).items():
        published = to_published(table, ours)
        assert published, f"{ours} has a published name"
        name, rule = published
        weights[name] = _drawn([shape[i] for i in (0, 3, 1, 2)] if rule.reordering else [*shape])
    return weights


def _drawn(shape: list[int]) -> mx.array:
    """Weights that neither grow nor shrink what they are applied to; of norms and biases, ones."""
    if len(shape) == 1:
        return mx.ones(shape)
    return mx.random.normal(shape) / prod(shape[1:]) ** 0.5


def write_qwen2_5_vl(folder: Path, size: Size) -> None:
    """A Qwen2.5-VL as mlx-vlm reads it, whose words are numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    eos = {"model_type": "qwen2_5_vl", "eos_token_id": SPECIAL["<eos>"]}
    _write(folder / CONFIG, qwen2_5_vl_config(size) | eos)
    weights: Any = dict(tree_flatten(qwen2_5_vl_model(size).parameters()))
    mx.save_safetensors(str(folder / WEIGHTS), weights, {"format": "mlx"})
    ids = {f"w{i}": i for i in range(VOCAB) if i not in SPECIAL.values()}
    tokenizer = Tokenizer(models.WordLevel(SPECIAL | ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(
        [AddedToken(word, special=True, normalized=False) for word in SPECIAL]
    )
    tokenizer.save(str(folder / TOKENIZER))
    names = {f"{name}_token": f"<{name}>" for name in ("eos", "pad", "unk")}
    more = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
    _write(folder / TOKENIZER_CONFIG, names | more)
    pixels = (2 * PATCH * size.side) ** 2  # a token is 2 x 2 patches
    picture = {
        "image_processor_type": "Qwen2VLImageProcessor", "patch_size": PATCH, "merge_size": 2,
        "temporal_patch_size": 2, "min_pixels": pixels, "max_pixels": pixels,
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip
    _write(folder / PREPROCESSOR, picture)


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content), encoding="utf-8")
