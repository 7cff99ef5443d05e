"""Our config.json, checked once: every size is bounded, every number and flag of its kind.

The shapes of the tensors (shapes.py) and the modules of a model, in MLX and in the reference, are
made from what `parse_config` returns.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

from . import backbones
from .backbones import BACKBONES, RUNNER
from .errors import UserError, is_unicode, quoted
from .quantization import Quantization, parse_quantization
from .reading.fields import Fields

CONFIG = "config.json"
LLAVA_TYPE = "composed_vlm"  # model_type of a LLaVA-style model; the others are MiniMind-V's
MODEL_TYPES = ("minimind2_v", "minimind3_v", LLAVA_TYPE)
TOWER_TYPES = ("clip_vision_model", "siglip_vision_model", "siglip2_vision_model")
CLIP_TYPE, SIGLIP_TYPE, NAFLEX_TYPE = TOWER_TYPES
ATTENTION_POOL = "attention_pool"  # the one learned pruner whose weights lie inside a checkpoint


@dataclass(frozen=True)
class EncoderConfig:
    """The sizes of a transformer that reads all its tokens at once, of images or of texts."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    layer_norm_eps: float = field(default=1e-5, kw_only=True)


@dataclass(frozen=True)
class CLIPConfig(EncoderConfig):
    """The fields of a CLIP's `vision_config`; the defaults are ViT-B/16."""

    image_size: int = 224
    patch_size: int = 16
    feature_layers: int = 0  # how many layers the features are computed by; 0: all

    @property
    def depth(self) -> int:
        """How many layers the features are computed by."""
        return self.feature_layers or self.num_hidden_layers

    @property
    def layers_behind(self) -> int:
        """How many layers are held behind those; signals may be read of the first of them."""
        return self.num_hidden_layers - self.depth

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        side = self.image_size // self.patch_size
        return side, side


@dataclass(frozen=True)
class SiglipConfig(CLIPConfig):
    """The fields of a SigLIP's; the defaults are SigLIP 2's base tower at 256 pixels."""

    image_size: int = 256
    patch_size: int = 32
    layer_norm_eps: float = field(default=1e-6, kw_only=True)
    post_norm: bool = True  # LLaVA's go without


@dataclass(frozen=True)
class MiniMindConfig:
    """The fields of `text_config`; the defaults are MiniMind2-Small (26 M)."""

    hidden_size: int = 512
    intermediate_size: int = 1408
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    vocab_size: int = 6400
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1e6
    max_position_embeddings: int = 32768
    qk_norm: bool = False
    attention_bias: bool = False  # of queries, keys and values: Qwen2's
    tie_word_embeddings: bool = True
    num_experts: int = 0  # 0: one MLP
    num_experts_per_tok: int = 0
    n_shared_experts: int = 0

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class MlxLmConfig:
    """The sizes of a model that mlx-lm computes; `text_config` has all of its fields."""

    model_type: str
    hidden_size: int
    num_hidden_layers: int
    vocab_size: int
    text_config: Mapping[str, Any]
    max_position_embeddings: int = sys.maxsize
    num_attention_heads: int = 0
    num_key_value_heads: int = 0
    head_dim: int = 0

    @classmethod
    def from_dict(cls, text_config: Mapping[str, Any]) -> "MlxLmConfig":
        names = [each.name for each in fields(cls)]
        sizes = {name: text_config[name] for name in names if name in text_config}
        return cls(**sizes | {"text_config": MappingProxyType(dict(text_config))})

    @property
    def layer_size(self) -> int:
        """Numbers in the matrices of one layer."""
        shapes = BACKBONES[self.model_type].layer(self.text_config).values()
        return sum(prod(shape) for shape in shapes if len(shape) > 1)


@dataclass(frozen=True)
class ProjectorConfig:
    """`merge` patches, down and across, become one token; `norm` stands before the layers."""

    merge: tuple[int, int] = (1, 1)
    norm: bool = True


@dataclass(frozen=True)
class VLMConfig:
    """Our config.json; `pruner` is the name of a learned pruner inside, and its tokens.

    Without `projector` the projector is one matrix.
    """

    vision: CLIPConfig | SiglipConfig = field(default_factory=CLIPConfig)
    text: MiniMindConfig | MlxLmConfig = field(default_factory=MiniMindConfig)
    projector: ProjectorConfig | None = None
    image_token: str = "@"
    image_token_id: int = 34
    pruner: tuple[str, int] | None = None
    quantization: Quantization | None = None

    @property
    def merge(self) -> tuple[int, int]:
        """The patches, down and across, that become one visual token."""
        return self.projector.merge if self.projector else (1, 1)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of an image's visual tokens."""
        (rows, columns), (down, across) = self.vision.grid, self.merge
        return rows // down, columns // across

    @property
    def N(self) -> int:
        """Visual tokens of one image."""
        return prod(self.grid)


def parse_config(config: Mapping[str, Any], file: Path) -> VLMConfig:
    """All of our config.json that shapes the model; UserError for an impossible value."""
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        raise UserError(
            f"{file} holds a {quoted(kind)} model; supported are {', '.join(MODEL_TYPES)}"
        )
    sizes, checked = parse_sizes(config, file), Fields(config, file)
    token, number = config.get("image_token", "@"), config.get("image_token_id", 34)
    if not isinstance(token, str) or not token or not is_unicode(token):
        raise checked.error("image_token", "the text of a token")
    if type(number) is not int or not 0 <= number < sizes.text.vocab_size:
        raise checked.error("image_token_id", "one of the vocabulary's")
    return replace(sizes, image_token=token, image_token_id=number)


def parse_sizes(config: Mapping[str, Any], file: Path) -> VLMConfig:
    """The same of a config.json that has no fields of the tokenizer yet."""
    checked = Fields(config, file)
    part = checked.part("vision_config")
    vision = parse_vision(part)
    if vision.image_size % vision.patch_size:
        raise UserError(f"{file}: {part.name}'s sizes do not divide evenly")
    return VLMConfig(
        vision,
        parse_text(checked.part("text_config")),
        _projector(checked, vision),
        pruner=_pruner(checked),
        quantization=parse_quantization(checked),
    )


def parse_text(part: Fields) -> MiniMindConfig | MlxLmConfig:
    """The language model's part."""
    if part.get("runner") == RUNNER:
        backbones.check_text_config(part)
        return MlxLmConfig.from_dict(part.values)
    text = read_sizes(MiniMindConfig, part)
    if text.hidden_size % text.num_attention_heads or text.head_dim % 2:
        raise UserError(f"{part.file}: {part.name}'s heads do not divide hidden_size evenly")
    if text.num_attention_heads % text.num_key_value_heads:
        raise UserError(f"{part.file}: {part.name}'s key/value heads do not divide its heads")
    if text.num_experts and not 1 <= text.num_experts_per_tok <= text.num_experts:
        raise UserError(f"{part.file}: a token cannot choose {text.num_experts_per_tok} experts")
    return text


def is_clip(vision: Mapping[str, Any]) -> bool:
    """Is a `vision_config` of ours a CLIP's? One without a model_type is."""
    return vision.get("model_type", CLIP_TYPE) == CLIP_TYPE


def parse_vision(part: Fields) -> CLIPConfig:
    """The tower's part. Raises UserError."""
    kind = part.values.get("model_type", CLIP_TYPE)
    if kind not in TOWER_TYPES:
        raise UserError(
            f"{part.file}: no tower is called {quoted(kind)}; there are {', '.join(TOWER_TYPES)}"
        )
    vision = read_sizes(CLIPConfig if is_clip(part.values) else SiglipConfig, part)
    if vision.image_size < vision.patch_size or vision.hidden_size % vision.num_attention_heads:
        raise UserError(f"{part.file}: {part.name}'s sizes do not divide evenly")
    if vision.feature_layers > vision.num_hidden_layers:
        raise part.error("feature_layers", f"one of its {vision.num_hidden_layers} layers")
    return vision


def _projector(config: Fields, vision: CLIPConfig) -> ProjectorConfig | None:
    """None is a projector of one matrix."""
    if config.get("projector") is None:
        return None
    part, sides = config.part("projector"), vision.grid
    merge = part.get("merge")
    listed = merge if isinstance(merge, list | tuple) and len(merge) == 2 else (0, 0)
    if not all(
        type(m) is int and m > 0 and side % m == 0 for m, side in zip(listed, sides, strict=True)
    ):
        raise part.error("merge", f"two numbers that divide the {sides[0]} patches of a side")
    return ProjectorConfig((listed[0], listed[1]), part.flag("norm"))


def _pruner(config: Fields) -> tuple[str, int] | None:
    if config.get("pruner") is None:
        return None
    part = config.part("pruner")
    if part.get("name") != ATTENTION_POOL:
        raise UserError(f"{config.file}: no learned pruner is called {quoted(part.get('name'))}")
    return ATTENTION_POOL, part.whole_number("tokens")


def read_sizes(kind: type, part: Fields) -> Any:
    """A dataclass of sizes; numbers must be there, but for those whose default is zero."""
    values: dict[str, Any] = {}
    for each in fields(kind):
        if isinstance(each.default, bool):
            values[each.name] = part.flag(each.name, each.default)
        elif each.default == 0 and each.name not in part.values:
            values[each.name] = 0
        elif each.type in (float, "float"):
            values[each.name] = part.positive(each.name)
        else:
            values[each.name] = part.whole_number(each.name)
    return kind(**values)
