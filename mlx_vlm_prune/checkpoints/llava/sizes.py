"""The sizes of a LLaVA-style model, from the config.json of transformers' layout.

A field that is left out has the default of transformers' class.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import backbones
from ..backbones import BACKBONES
from ..config import CLIP_TYPE, SIGLIP_TYPE
from ..errors import UserError, quoted
from ..reading.fields import Fields

_PLAIN_FIELDS = (  # of a language model that our own decoder computes
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "vocab_size", "rms_norm_eps", "max_position_embeddings",
)  # fmt: skip
_TOWER = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "image_size": 224, "num_channels": 3,
}  # fmt: skip
TOWER_DEFAULTS: dict[str, dict[str, Any]] = {
    CLIP_TYPE: {**_TOWER, "patch_size": 32, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu"},
    SIGLIP_TYPE: {
        **_TOWER, "patch_size": 16, "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh",
    },
}  # fmt: skip


def text_config(
    text: Mapping[str, Any], config: Mapping[str, Any], where: Path,
    has_head: bool = True, has_head_bias: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """The language model's part of our config.json, from the part `text` of a published `config`.

    What our own decoder does not compute is left to mlx-lm. `has_head` and `has_head_bias` say
    whether the files hold an output layer, and its bias. Raises UserError for what neither
    computes.
    """
    kind = text.get("model_type", "llama")
    if kind not in [*BACKBONES]:
        raise UserError(
            f"{where}: no language model is called {quoted(kind)}; there are {', '.join(BACKBONES)}"
        )
    values = {"rope_theta": 10000.0, **BACKBONES[kind].defaults, **text}
    values.setdefault("num_key_value_heads", values.get("num_attention_heads"))
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not _is_plain(kind, values, rope):
        return backbones.text_config(text, config, where, has_head, has_head_bias)
    tied = bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", False)))
    return {
        **{name: values[name] for name in _PLAIN_FIELDS},
        "attention_bias": kind == "qwen2",
        "model_type": kind,
        "rope_theta": rope.get("rope_theta", values["rope_theta"]),
        "tie_word_embeddings": tied,
    }


def _is_plain(kind: str, values: Mapping[str, Any], rope: Any) -> bool:
    """Is it a Llama or a Qwen2 as our own decoder computes them?"""
    heads, head_dim, D = (values.get(k) for k in ("num_attention_heads", "head_dim", "hidden_size"))
    heads_fit = type(head_dim) is int and type(heads) is int and head_dim * heads == D
    return (
        kind in ("llama", "qwen2")
        and isinstance(rope, Mapping)
        and rope.get("rope_type", rope.get("type", "default")) == "default"
        and values.get("hidden_act", "silu") == "silu"
        and (not values.get("attention_bias") or kind == "qwen2")
        and not values.get("mlp_bias")
        and (head_dim is None or heads_fit)
        and not values.get("use_sliding_window")
    )


def vision_config(config: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """The tower's part of our config.json, with the layer whose features LLaVA reads."""
    vision = Fields(config, where).part("vision_config").values
    kind = vision.get("model_type", CLIP_TYPE)
    if kind not in [*TOWER_DEFAULTS]:
        raise UserError(
            f"{where}: no tower is called {quoted(kind)}; there are {', '.join(TOWER_DEFAULTS)}"
        )
    defaults = TOWER_DEFAULTS[kind]
    values, activation = {**defaults, **vision}, defaults["hidden_act"]
    if values["hidden_act"] != activation:
        raise UserError(
            f"{where}: hidden_act is {quoted(values['hidden_act'])}; {kind} has {activation}"
        )
    is_clip = kind == CLIP_TYPE
    needed = "default" if is_clip else "full"  # SigLIP has no CLS to leave out
    strategy = config.get("vision_feature_select_strategy", "default")
    if strategy != needed:
        raise UserError(
            f"{where}: vision_feature_select_strategy is {quoted(strategy)}; {kind} needs {needed}"
        )
    layers = Fields(values, where, "vision_config").whole_number("num_hidden_layers")
    return {
        **{name: values[name] for name in defaults if name != "num_channels"},
        "feature_layers": _feature_layers(config, layers, where),
        "model_type": kind,
        **({} if is_clip else {"post_norm": False}),
    }


def _feature_layers(config: Mapping[str, Any], layers: int, where: Path) -> int:
    """How many of the tower's layers are run; -2 leaves out the last."""
    number = config.get("vision_feature_layer", -2)
    run = number if type(number) is not int or number >= 0 else layers + 1 + number
    if type(run) is not int or not 1 <= run <= layers:
        raise UserError(
            f"{where}: vision_feature_layer is {quoted(number)}; one of {layers} layers is"
            " supported"
        )
    return run
