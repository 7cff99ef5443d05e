"""A whole CLIP or SigLIP as Hugging Face publishes it: sizes, names and tensors of both towers.

A field that config.json leaves out has the default of transformers' class.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .command_line import either
from .config import (
    CLIP_TYPE,
    CONFIG,
    SIGLIP_TYPE,
    CLIPConfig,
    EncoderConfig,
    SiglipConfig,
    parse_vision,
    read_sizes,
)
from .errors import UserError, quoted
from .layer_shapes import Shapes, linear, norm
from .llava.sizes import TOWER_DEFAULTS
from .names.renaming import to_our_names, to_our_order
from .names.towers import WHOLE_CLIP, WHOLE_SIGLIP
from .reading.fields import Fields
from .reading.files import read_json
from .reading.tensors import RawTensor
from .reading.weights import read_weights
from .shapes import check_shapes, encoder_shapes, tower_shapes

TITLES = {"clip": "CLIP", "siglip": "SigLIP"}  # by the model_type of config.json
HALVES = ("clip_vision_model", "clip_text_model", "siglip_vision_model", "siglip_text_model")
NUMBERS = ("logit_scale", "logit_bias")
HIDDEN_ACTS = ("quick_gelu", "gelu", "gelu_pytorch_tanh")  # OpenAI's, OpenCLIP's, SigLIP's
LEGACY_EOS = 2  # eos_token_id of configs that were written before it was right
BUFFERS = re.compile(r"(vision|text)_model\.embeddings\.position_ids")
_TEXT = {"num_hidden_layers": 12, "intermediate_size": 2048, "hidden_size": 512}
TEXT_DEFAULTS: dict[str, dict[str, Any]] = {
    "clip": {
        **_TEXT, "vocab_size": 49408, "num_attention_heads": 8, "max_position_embeddings": 77,
        "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu", "eos_token_id": 49407,
    },
    "siglip": {
        **_TEXT, "vocab_size": 32000, "num_attention_heads": 12, "max_position_embeddings": 64,
        "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 768,
        "intermediate_size": 3072, "eos_token_id": 49407,
    },
}  # fmt: skip


@dataclass(frozen=True)
class TextTowerConfig(EncoderConfig):
    """The fields of `text_config`."""

    vocab_size: int = 49408
    max_position_embeddings: int = 77
    eos_token_id: int = 49407


@dataclass(frozen=True)
class DualEncoderConfig:
    """The sizes of both towers; `dims` is the size of the embeddings that they share.

    `hidden_acts`: the activation of the vision tower's MLPs, and of the text tower's.
    """

    vision: CLIPConfig
    text: TextTowerConfig
    dims: int
    hidden_acts: tuple[str, str]

    @property
    def is_clip(self) -> bool:
        return not isinstance(self.vision, SiglipConfig)

    @property
    def title(self) -> str:
        return TITLES["clip" if self.is_clip else "siglip"]


def read_dual_encoder(folder: Path) -> tuple[DualEncoderConfig, dict[str, RawTensor]]:
    """The sizes, and the tensors under our names, which stay on the disk. Raises UserError."""
    file = folder / CONFIG
    whole = read_json(file)
    kind = whole.get("model_type")
    if kind is None:
        raise UserError(
            f"{file} has no model_type, so it is no whole CLIP or SigLIP (clip, siglip)"
        )
    if kind in HALVES:
        raise UserError(f"{folder} is a {kind}, one half; a whole CLIP or SigLIP has both towers")
    if kind not in [*TITLES]:
        raise UserError(
            f"{folder} is a {quoted(kind)} model, no whole CLIP or SigLIP (clip, siglip)"
        )
    config = _parse(whole, kind, file)
    state = {k: v for k, v in read_weights(folder).items() if not BUFFERS.fullmatch(k)}
    table = WHOLE_CLIP if config.is_clip else WHOLE_SIGLIP
    tensors = to_our_names(state, table, f"a {config.title}", folder)
    tensors = to_our_order(tensors, table, 1)
    # A number is published with an axis or without.
    tensors |= {k: tensors[k].reshaped(()) for k in NUMBERS if k in tensors}
    check_shapes(tensors, expected_shapes(config), folder)
    return config, tensors


def expected_shapes(config: DualEncoderConfig) -> Shapes:
    """Every tensor that the files must have, under our names."""
    vision, text = config.vision, config.text
    D, width = text.hidden_size, vision.hidden_size
    shapes: Shapes = {
        **tower_shapes(vision),
        "text.embeddings.token_embedding.weight": (text.vocab_size, D),
        "text.embeddings.position_embedding.weight": (text.max_position_embeddings, D),
        **encoder_shapes("text", text),
        **norm("text.final_layer_norm", D, True),
        "logit_scale": (),
    }
    if config.is_clip:
        shapes |= linear("visual_projection", config.dims, width)
        return shapes | linear("text_projection", config.dims, D)
    return {
        **shapes,
        "logit_bias": (),
        "head.probe": (1, 1, width),
        "head.attention.in_proj_weight": (3 * width, width),
        "head.attention.in_proj_bias": (3 * width,),
        **linear("head.attention.out_proj", width, width, True),
        **norm("head.layernorm", width, True),
        **linear("head.mlp.fc1", vision.intermediate_size, width, True),
        **linear("head.mlp.fc2", width, vision.intermediate_size, True),
        **linear("text.head", config.dims, D, True),
    }


def _parse(whole: Mapping[str, Any], kind: str, file: Path) -> DualEncoderConfig:
    """Raises UserError for an impossible value."""
    vision_part = _vision(whole, kind, file)
    vision = parse_vision(vision_part)
    part = _with_defaults(whole, "text", TEXT_DEFAULTS[kind], file)
    acts = vision_part.get("hidden_act"), part.get("hidden_act")
    text: TextTowerConfig = read_sizes(TextTowerConfig, part)
    if text.hidden_size % text.num_attention_heads:
        raise UserError(f"{file}: {part.name}'s heads do not divide hidden_size evenly")
    if kind == "clip":
        dims = Fields({"projection_dim": 512, **whole}, file).whole_number("projection_dim")
        return DualEncoderConfig(vision, text, dims, acts)
    dims = vision.hidden_size
    size = part.get("projection_size") or text.hidden_size
    if size != dims:
        raise UserError(
            f"{file}: the text's embedding has {quoted(size)} numbers, the image's {dims}"
        )
    return DualEncoderConfig(vision, text, dims, acts)


def _vision(whole: Mapping[str, Any], kind: str, file: Path) -> Fields:
    """The vision tower's part, as one of our own config.json."""
    tower_type = CLIP_TYPE if kind == "clip" else SIGLIP_TYPE
    part = _with_defaults(whole, "vision", TOWER_DEFAULTS[tower_type], file)
    if part.get("num_channels") != 3:
        raise part.error("num_channels", "3, red, green and blue")
    if part.values.get("vision_use_head", True) is not True:
        raise part.error("vision_use_head", "true; without a head there is no embedding")
    sizes = {name: part.get(name) for name in TOWER_DEFAULTS[tower_type]}
    return Fields({**sizes, "model_type": tower_type}, file, part.name)


def _with_defaults(
    whole: Mapping[str, Any], half: str, defaults: Mapping[str, Any], file: Path
) -> Fields:
    """The part of one half, with the defaults of transformers' class.

    `text_config_dict`, which older files have beside `text_config`, stands in its place.
    """
    name = f"{half}_config"
    name = f"{name}_dict" if whole.get(f"{name}_dict") is not None else name
    part = Fields({name: {}, **whole}, file).part(name)
    part = Fields({**defaults, **part.values}, file, name)
    if part.get("hidden_act") not in HIDDEN_ACTS:
        raise part.error("hidden_act", either(HIDDEN_ACTS))
    return part
