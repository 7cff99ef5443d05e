"""Every tensor that a checkpoint of given sizes must have, with its shape, under our names."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import backbones
from .backbones import LARGEST, MOST_LAYERS
from .errors import UserError
from .generations import Shaped

CONFIG = "config.json"
Shapes = dict[str, tuple[int, ...]]
SIZES = {
    "text_config": [
        "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers",
        "num_key_value_heads", "vocab_size",
    ],
    "vision_config": [
        "hidden_size", "image_size", "intermediate_size", "num_hidden_layers", "patch_size",
    ],
}  # fmt: skip
BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (16, 32, 64, 128)
# Bits and group sizes of each mode of quantization, the default first.
MODES = {
    "affine": ((4, 2, 3, 5, 6, 8), (64, 32, 128)),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
}


def check_complete(tensors: Mapping[str, Shaped], config: Mapping[str, Any], where: Path) -> None:
    """UserError that names the first tensor which is missing, misshapen or one too many."""
    expected = expected_shapes(config, where / CONFIG if where.is_dir() else Path(CONFIG))
    for name, shape in expected.items():
        if name not in tensors:
            raise UserError(f"{where} lacks the tensor {name} {shape}")
        if tensors[name].shape != shape:
            raise UserError(f"{where}: tensor {name} is {tensors[name].shape}; {shape} is expected")
    for name in tensors:
        if name not in expected:
            raise UserError(f"{where} holds a tensor {name} that this model has no place for")


def expected_shapes(config: Mapping[str, Any], file: Path = Path(CONFIG)) -> Shapes:
    """All shapes that a config.json of ours asks for; UserError for a size that cannot be."""
    vision = _sizes(config, "vision_config", SIZES["vision_config"], file)
    told = config.get("text_config")
    width = vision["hidden_size"]
    if isinstance(told, Mapping) and backbones.is_backbone(told):
        backbones.check(told, file)
        text, shapes = told, backbones.shapes(told)
    else:
        text = _sizes(config, "text_config", SIZES["text_config"], file)
        shapes = _language(text)
    shapes |= _tower(vision)
    shapes |= _projector(config.get("projector"), text["hidden_size"], width, file)
    if "pruner" in config:
        pruner = _sizes(config, "pruner", ["tokens"], file)
        shapes["pruner.queries"] = (pruner["tokens"], width)
        for x in "qkv":
            shapes |= _linear(f"pruner.{x}_proj", width, width)
    if config.get("quantization") is None:
        return shapes
    return _few_bits(shapes, _sizes(config, "quantization", ["bits", "group_size"], file))


def _sizes(
    config: Mapping[str, Any], part: str, names: Sequence[str], file: Path
) -> Mapping[str, Any]:
    """A part of a config.json, its sizes checked."""
    told = config.get(part)
    if not isinstance(told, Mapping):
        raise UserError(f"{file} has no {part}")
    both = ["num_experts", "num_experts_per_tok"] if "num_experts" in told else []
    shared = ["n_shared_experts"] if "n_shared_experts" in told else []
    for name in (*names, *both, *shared):
        most = MOST_LAYERS if "layers" in name or "experts" in name else LARGEST
        if type(told.get(name)) is not int or not 1 <= told[name] <= most:
            raise UserError(
                f"{file}: {part}.{name} is {str(told.get(name))[:40]}, not a whole number "
                f"from 1 to {most}"
            )
    return told


def is_quantisable(name: str, shape: tuple[int, ...], group_size: int) -> bool:
    """Is this a matrix of the language model that -q makes smaller? A router stays."""
    matrix = name.startswith("language.") and name.endswith(".weight") and len(shape) == 2
    return matrix and not name.endswith(".mlp.gate.weight") and shape[1] % group_size == 0


def check_packable(name: str, shape: tuple[int, ...], mode: str) -> None:
    """UserError for a matrix that MLX cannot pack: nvfp4 takes 32 numbers, in a row or across."""
    rows, columns = shape
    if mode == "nvfp4" and rows * columns % 32:
        raise UserError(
            f"{name} is {rows} x {columns}: nvfp4 needs an even number of rows, or rows that 32"
            " divides; take another mode"
        )


def _few_bits(shapes: Shapes, how: Mapping[str, Any]) -> Shapes:
    """The same of a quantized checkpoint: bits packed into words of 32, scales, and biases."""
    bits, group = how["bits"], how["group_size"]
    mode = how.get("mode", "affine")
    parts = ("scales", "biases") if mode == "affine" else ("scales",)
    made: Shapes = {}
    for name, shape in shapes.items():
        made[name] = shape
        if is_quantisable(name, shape, group):
            check_packable(name, shape, mode)
            made[name] = (shape[0], shape[1] * bits // 32)
            prefix = name.removesuffix("weight")
            made |= {prefix + part: (shape[0], shape[1] // group) for part in parts}
    return made


def _linear(name: str, rows: int, columns: int) -> Shapes:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def _norm(name: str, size: int) -> Shapes:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def _projector(told: Any, D: int, width: int, file: Path) -> Shapes:
    """One matrix, or two with a GELU between them, of patches that were put together."""
    if told is None:
        return _linear("projector", D, width)
    merge = told.get("merge") if isinstance(told, Mapping) else None
    if not isinstance(merge, list | tuple) or len(merge) != 2 or set(merge) - set(range(1, 65)):
        raise UserError(f"{file}: projector.merge is {merge!r}, not two numbers from 1 to 64")
    wide = merge[0] * merge[1] * width
    norm = _norm("projector.norm", wide) if told.get("norm") else {}
    return norm | _linear("projector.fc1", D, wide) | _linear("projector.fc2", D, D)


def _language(c: Mapping[str, Any]) -> Shapes:
    D, head_dim = c["hidden_size"], c["hidden_size"] // c["num_attention_heads"]
    keys = head_dim * c["num_key_value_heads"]
    shapes: Shapes = {"language.embed_tokens.weight": (c["vocab_size"], D)}
    for i in range(c["num_hidden_layers"]):
        layer = f"language.layers.{i}"
        rows = {"q_proj": D, "k_proj": keys, "v_proj": keys, "o_proj": D}
        shapes |= {f"{layer}.self_attn.{name}.weight": (size, D) for name, size in rows.items()}
        if c.get("attention_bias"):
            shapes |= {f"{layer}.self_attn.{x}_proj.bias": (rows[f"{x}_proj"],) for x in "qkv"}
        if c.get("qk_norm"):
            shapes |= {f"{layer}.self_attn.{x}_norm.weight": (head_dim,) for x in "qk"}
        shapes |= _mlps(f"{layer}.mlp", c)
        shapes[f"{layer}.input_layernorm.weight"] = (D,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (D,)
    shapes["language.norm.weight"] = (D,)
    if not c.get("tie_word_embeddings", True):
        shapes["language.lm_head.weight"] = (c["vocab_size"], D)
    return shapes


def _mlps(name: str, c: Mapping[str, Any]) -> Shapes:
    D, inner, experts = c["hidden_size"], c["intermediate_size"], c.get("num_experts", 0)
    if not experts:
        return _mlp(name, D, inner)
    shapes: Shapes = {f"{name}.gate.weight": (experts, D)}
    for i in range(experts):
        shapes |= _mlp(f"{name}.experts.{i}", D, inner)
    for i in range(c.get("n_shared_experts", 0)):
        shapes |= _mlp(f"{name}.shared_experts.{i}", D, inner)
    return shapes


def _mlp(name: str, D: int, inner: int) -> Shapes:
    shapes: Shapes = {f"{name}.{way}_proj.weight": (inner, D) for way in ("gate", "up")}
    return shapes | {f"{name}.down_proj.weight": (D, inner)}


def _tower(c: Mapping[str, Any]) -> Shapes:
    D, inner, patch = c["hidden_size"], c["intermediate_size"], c["patch_size"]
    clip = c.get("model_type", "clip_vision_model") == "clip_vision_model"
    patches = (c["image_size"] // patch) ** 2
    shapes: Shapes = {
        "tower.embeddings.patch_embedding.weight": (D, patch, patch, 3),
        "tower.embeddings.position_embedding.weight": (patches + clip, D),
        **_norm("tower.post_layernorm", D),
    }
    if clip:
        shapes |= {"tower.embeddings.class_embedding": (D,), **_norm("tower.pre_layrnorm", D)}
    else:
        shapes["tower.embeddings.patch_embedding.bias"] = (D,)
    for i in range(c["num_hidden_layers"]):
        layer = f"tower.encoder.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _linear(f"{layer}.self_attn.{name}", D, D)
        shapes |= _linear(f"{layer}.mlp.fc1", inner, D) | _linear(f"{layer}.mlp.fc2", D, inner)
        shapes |= _norm(f"{layer}.layer_norm1", D) | _norm(f"{layer}.layer_norm2", D)
    return shapes
