"""Shapes of tensors under our names: those that a checkpoint must have, and those that it has."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path

from . import backbones
from .config import (
    CLIPConfig,
    EncoderConfig,
    MiniMindConfig,
    MlxLmConfig,
    ProjectorConfig,
    SiglipConfig,
    VLMConfig,
)
from .errors import UserError, clipped
from .layer_shapes import Shapes, attention, gated_mlp, layer_norms, linear, norm, qk_norms
from .names.ranges import list_names
from .quantization import packed
from .reading.tensors import RawTensor, Shaped
from .reading.weights import check_dtypes


def check_complete(tensors: Mapping[str, Shaped], config: VLMConfig, where: Path) -> None:
    """UserError that names all tensors which are missing, or the first that is misshapen or one too
    many."""
    check_shapes(tensors, expected_shapes(config), where)


def check_shapes(tensors: Mapping[str, Shaped], expected: Shapes, where: Path) -> None:
    """The same of shapes that are known."""
    missing = [name for name in expected if name not in tensors]
    if len(missing) == 1:
        raise UserError(f"{where} lacks the tensor {missing[0]} {expected[missing[0]]}")
    if missing:
        raise UserError(f"{where} lacks {len(missing)} tensors: {list_names(missing)}")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise UserError(f"{where}: tensor {name} is {tensors[name].shape}; {shape} is expected")
    for name in tensors:
        if name not in expected:
            raise UserError(
                f"{where} holds a tensor {clipped(name)} that this model has no place for"
            )
    check_dtypes({k: t for k, t in tensors.items() if isinstance(t, RawTensor)}, where)


def expected_shapes(config: VLMConfig) -> Shapes:
    """Every tensor that a checkpoint must have; UserError for a matrix that MLX cannot pack."""
    text, width = config.text, config.vision.hidden_size
    if isinstance(text, MlxLmConfig):
        shapes = backbones.language_shapes(text.text_config)
    else:
        shapes = _minimind_shapes(text)
    shapes |= tower_shapes(config.vision)
    shapes |= _projector(config.projector, text.hidden_size, width)
    if config.pruner:
        shapes["pruner.queries"] = (config.pruner[1], width)
        for x in "qkv":
            shapes |= _linear(f"pruner.{x}_proj", width, width)
    return packed(shapes, config.quantization) if config.quantization else shapes


_linear, _norm = partial(linear, bias=True), partial(norm, bias=True)


def _projector(c: ProjectorConfig | None, D: int, width: int) -> Shapes:
    if c is None:
        return _linear("projector", D, width)
    merged_width = c.merge[0] * c.merge[1] * width
    norm_shapes = _norm("projector.norm", merged_width) if c.norm else {}
    return norm_shapes | _linear("projector.fc1", D, merged_width) | _linear("projector.fc2", D, D)


def _minimind_shapes(c: MiniMindConfig) -> Shapes:
    D, at = c.hidden_size, "language"
    shapes: Shapes = {f"{at}.embed_tokens.weight": (c.vocab_size, D)}
    layer = attention(asdict(c) | {"head_dim": c.head_dim}, c.attention_bias, False)
    layer |= (qk_norms(c.head_dim) if c.qk_norm else {}) | _mlps(c) | layer_norms(D)
    for i in range(c.num_hidden_layers):
        shapes |= {f"{at}.layers.{i}.{name}": shape for name, shape in layer.items()}
    shapes |= norm(f"{at}.norm", D)
    return shapes if c.tie_word_embeddings else shapes | linear(f"{at}.lm_head", c.vocab_size, D)


def _mlps(c: MiniMindConfig) -> Shapes:
    D, inner, experts = c.hidden_size, c.intermediate_size, c.num_experts
    if not experts:
        return gated_mlp("mlp", D, inner)
    shapes = linear("mlp.gate", experts, D)
    for kind, count in (("experts", experts), ("shared_experts", c.n_shared_experts)):
        for i in range(count):
            shapes |= gated_mlp(f"mlp.{kind}.{i}", D, inner)
    return shapes


def tower_shapes(c: CLIPConfig) -> Shapes:
    """Every tensor of a vision tower."""
    D, patch = c.hidden_size, c.patch_size
    clip = not isinstance(c, SiglipConfig)
    patches = c.grid[0] * c.grid[1]
    shapes: Shapes = {
        "tower.embeddings.patch_embedding.weight": (D, patch, patch, 3),
        "tower.embeddings.position_embedding.weight": (patches + clip, D),
        **_norm("tower.post_layernorm", D),
    }
    if clip:
        shapes |= {"tower.embeddings.class_embedding": (D,), **_norm("tower.pre_layrnorm", D)}
    else:
        shapes["tower.embeddings.patch_embedding.bias"] = (D,)
    return shapes | encoder_shapes("tower", c)


def encoder_shapes(tower: str, c: EncoderConfig) -> Shapes:
    """Every tensor of a tower's layers."""
    D, inner = c.hidden_size, c.intermediate_size
    shapes: Shapes = {}
    for i in range(c.num_hidden_layers):
        layer = f"{tower}.encoder.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _linear(f"{layer}.self_attn.{name}", D, D)
        shapes |= _linear(f"{layer}.mlp.fc1", inner, D) | _linear(f"{layer}.mlp.fc2", D, inner)
        shapes |= _norm(f"{layer}.layer_norm1", D) | _norm(f"{layer}.layer_norm2", D)
    return shapes


def tensor_shape(state: Mapping[str, Shaped], name: str, where: Path) -> tuple[int, ...]:
    """The shape of a tensor that must be there."""
    if name not in state:
        raise UserError(f"{where} lacks the tensor {name}")
    return state[name].shape


def matrix_shape(state: Mapping[str, Shaped], name: str, where: Path) -> tuple[int, int]:
    """The shape of a tensor that must be there and be a matrix."""
    shape = tensor_shape(state, name, where)
    if len(shape) != 2 or 0 in shape:
        raise UserError(f"{where}: tensor {name} has shape {shape}; it must be a matrix")
    return shape[0], shape[1]


def layer_count(names: Iterable[str], pattern: str, where: Path) -> int:
    """How many layers the names have; `pattern` has the layer's number as its group."""
    numbers = {int(match[1]) for name in names if (match := re.match(pattern, name))}
    if numbers != set(range(len(numbers))):
        missing = min(set(range(len(numbers))) - numbers)
        raise UserError(f"{where} has layers up to {max(numbers)}, but lacks layer {missing}")
    return len(numbers)
