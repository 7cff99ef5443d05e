"""Every tensor that a MiniMind2-V of given sizes must have, with its shape, under our names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from .errors import UserError

Shapes = dict[str, tuple[int, ...]]


class Shaped(Protocol):
    """Any tensor, whatever its library."""

    @property
    def shape(self) -> tuple[int, ...]: ...


def check_complete(tensors: Mapping[str, Shaped], config: Mapping[str, Any], where: Path) -> None:
    """UserError that names the first tensor which is missing, misshapen or one too many."""
    expected = expected_shapes(config)
    for name, shape in expected.items():
        if name not in tensors:
            raise UserError(f"{where} lacks the tensor {name} {shape}")
        if tensors[name].shape != shape:
            raise UserError(f"{where}: tensor {name} is {tensors[name].shape}; {shape} is expected")
    for name in tensors:
        if name not in expected:
            raise UserError(f"{where} holds a tensor {name} that this model has no place for")


def expected_shapes(config: Mapping[str, Any]) -> Shapes:
    """All shapes that a config.json of ours asks for."""
    text, vision = config["text_config"], config["vision_config"]
    width = vision["hidden_size"]
    shapes = _language(text) | _tower(vision)
    shapes |= _linear("projector", text["hidden_size"], width)
    if "pruner" in config:
        shapes["pruner.queries"] = (config["pruner"]["tokens"], width)
        for x in "qkv":
            shapes |= _linear(f"pruner.{x}_proj", width, width)
    return shapes


def _linear(name: str, rows: int, columns: int) -> Shapes:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def _norm(name: str, size: int) -> Shapes:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def _language(c: Mapping[str, Any]) -> Shapes:
    D, inner = c["hidden_size"], c["intermediate_size"]
    keys = D // c["num_attention_heads"] * c["num_key_value_heads"]
    shapes: Shapes = {"language.embed_tokens.weight": (c["vocab_size"], D)}
    for i in range(c["num_hidden_layers"]):
        layer = f"language.layers.{i}"
        rows = {"q_proj": D, "k_proj": keys, "v_proj": keys, "o_proj": D}
        shapes |= {f"{layer}.self_attn.{name}.weight": (size, D) for name, size in rows.items()}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (inner, D) for name in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (D, inner)
        shapes[f"{layer}.input_layernorm.weight"] = (D,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (D,)
    shapes["language.norm.weight"] = (D,)
    return shapes


def _tower(c: Mapping[str, Any]) -> Shapes:
    D, inner, patch = c["hidden_size"], c["intermediate_size"], c["patch_size"]
    tokens = (c["image_size"] // patch) ** 2 + 1
    shapes: Shapes = {
        "tower.embeddings.class_embedding": (D,),
        "tower.embeddings.patch_embedding.weight": (D, patch, patch, 3),
        "tower.embeddings.position_embedding.weight": (tokens, D),
        **_norm("tower.pre_layrnorm", D),
        **_norm("tower.post_layernorm", D),
    }
    for i in range(c["num_hidden_layers"]):
        layer = f"tower.encoder.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _linear(f"{layer}.self_attn.{name}", D, D)
        shapes |= _linear(f"{layer}.mlp.fc1", inner, D) | _linear(f"{layer}.mlp.fc2", D, inner)
        shapes |= _norm(f"{layer}.layer_norm1", D) | _norm(f"{layer}.layer_norm2", D)
    return shapes
