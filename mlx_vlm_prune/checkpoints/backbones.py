"""The language models of LLaVAs that mlx-lm computes: sizes, names and shapes of their tensors.

Our own decoder computes Llama and Qwen2 in their usual form. Other rotations, biases, head sizes
and families are left to mlx-lm. Behind `language.` their tensors have mlx-lm's names, which are
Hugging Face's.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import layer_shapes
from .errors import UserError, quoted
from .layer_shapes import Shapes, Sizes, linear, norm
from .names.rules import Rule, Table
from .names.value_order import Reordering
from .reading.fields import Fields, is_positive

RUNNER = "mlx-lm"  # text_config.runner of a model that mlx-lm computes


def _free_heads(c: Sizes, where: Path) -> dict[str, Any]:
    """Heads whose size may be any; one that is left out follows from hidden_size."""
    kv_heads = c.get("num_key_value_heads") or c.get("num_attention_heads")
    if c.get("head_dim") is not None:
        return {"num_key_value_heads": kv_heads}
    return _equal_heads(c, where)


def _equal_heads(c: Sizes, where: Path) -> dict[str, Any]:
    """Heads that together are as wide as hidden_size."""
    D, heads, head_dim = c["hidden_size"], c["num_attention_heads"], c.get("head_dim")
    divides = type(D) is int and type(heads) is int and heads > 0 and D % heads == 0
    if not divides or head_dim not in (None, D // heads):
        raise UserError(
            f"{where}: {heads} heads of {head_dim or 'equal size'} do not make a hidden_size of {D}"
        )
    kv_heads = c.get("num_key_value_heads") or heads
    return {"num_key_value_heads": kv_heads, "head_dim": D // heads}


def _mamba_sizes(c: Sizes, where: Path) -> dict[str, Any]:
    """Mamba's sizes that follow from others."""
    part = Fields(c, where, "text_config")
    D, rank = part.whole_number("hidden_size"), c["time_step_rank"]
    rank = -(-D // 16) if rank == "auto" else rank
    return {"intermediate_size": int(part.positive("expand") * D), "time_step_rank": rank}


def _mamba_2_sizes(c: Sizes, where: Path) -> dict[str, Any]:
    """Mamba-2's, whose steps may have any length."""
    sizes, limits = _mamba_sizes(c, where), c.get("time_step_limit", _ANY_STEP[0])
    if limits not in _ANY_STEP:
        raise UserError(
            f"{where}: time_step_limit is {quoted(limits)}; only [0.0, Infinity] is supported"
        )
    return sizes


_ATTENTION_SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings",
)  # fmt: skip
_MAMBA_SIZES = (
    "hidden_size", "intermediate_size", "state_size", "time_step_rank", "conv_kernel",
    "num_hidden_layers", "vocab_size",
)  # fmt: skip
_MAMBA_2_SIZES = (*_MAMBA_SIZES, "num_heads", "head_dim", "n_groups")
# As Python writes it and as transformers does.
_ANY_STEP = ([0.0, float("inf")], [0.0, {"__float__": "Infinity"}])


@dataclass(frozen=True)
class Backbone:
    """A family of language models."""

    title: str
    defaults: dict[str, Any]  # of transformers' class, for fields that config.json leaves out
    supported: dict[str, tuple]  # values of a field that mlx-lm computes, the default first
    layer: Callable[[Sizes], Shapes]  # the tensors of one layer
    derived: Callable[[Sizes, Path], dict[str, Any]] = _free_heads  # sizes that follow from others
    sizes: tuple[str, ...] = _ATTENTION_SIZES  # fields that are whole numbers
    numbers: tuple[str, ...] = ("rms_norm_eps", "rope_theta")  # fields that are positive numbers
    # Kinds of rotation besides the plain one, each with its fields.
    rotations: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    body: str = "model"  # what the names of its tensors begin with
    embedding: str = "embed_tokens"
    norm: str = "norm"
    has_norm_bias: bool = False  # of the last norm
    reorderings: Mapping[str, Reordering] = field(default_factory=dict)  # by name in `body`

    @property
    def flags(self) -> list[str]:
        """The fields that are true or false."""
        return [name for name, value in self.defaults.items() if isinstance(value, bool)]


_LLAMA = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "vocab_size": 32000, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048, "attention_bias": False, "mlp_bias": False,
}  # fmt: skip
_QWEN = {
    **_LLAMA, "intermediate_size": 22016, "num_key_value_heads": 32, "vocab_size": 151936,
    "max_position_embeddings": 32768,
}  # fmt: skip
_PHI = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
    "num_attention_heads": 32, "vocab_size": 51200, "layer_norm_eps": 1e-5,
    "max_position_embeddings": 2048, "partial_rotary_factor": 0.5,
}  # fmt: skip
_GEMMA = {
    "hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256, "vocab_size": 256000,
    "rms_norm_eps": 1e-6, "max_position_embeddings": 8192, "tie_word_embeddings": True,
}  # fmt: skip
_MAMBA = {
    "hidden_size": 768, "state_size": 16, "num_hidden_layers": 32, "vocab_size": 50280,
    "expand": 2, "conv_kernel": 4, "time_step_rank": "auto", "use_bias": False,
    "use_conv_bias": True, "tie_word_embeddings": True,
}  # fmt: skip
_MAMBA_2 = {
    **_MAMBA, "hidden_size": 4096, "state_size": 128, "num_hidden_layers": 64, "vocab_size": 32768,
    "num_heads": 128, "head_dim": 64, "n_groups": 8, "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": False,
}  # fmt: skip
_SILU = {"hidden_act": ("silu",)}
_QWENS = {**_SILU, "use_sliding_window": (False,)}
_LLAMA3 = {
    "llama3": (
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    ),
}  # fmt: skip
# PyTorch's convolutions over a sequence have (out, in, length), MLX's (out, length, in).
_SEQUENCE = Reordering(
    lambda tensor, head_dim: tensor.permuted((0, 2, 1)),
    lambda tensor, head_dim: tensor.permuted((0, 2, 1)),
    3,
)
BACKBONES = {
    "llama": Backbone("Llama", _LLAMA, _SILU, layer_shapes.llama, rotations=_LLAMA3),
    "qwen2": Backbone("Qwen2", _QWEN, _QWENS, layer_shapes.qwen2, _equal_heads),
    "qwen3": Backbone(
        "Qwen3", {**_QWEN, "head_dim": 128}, {**_QWENS, "attention_bias": (False,)},
        layer_shapes.qwen3,
    ),
    "phi": Backbone(
        "Phi", _PHI, {"hidden_act": ("gelu_new",), "qk_layernorm": (False,)}, layer_shapes.phi,
        _equal_heads, numbers=("layer_norm_eps", "rope_theta", "partial_rotary_factor"),
        norm="final_layernorm", has_norm_bias=True,
    ),
    "gemma": Backbone(  # "gelu" is an old name of the same
        "Gemma", _GEMMA,
        {
            "hidden_act": ("gelu_pytorch_tanh", "gelu"), "attention_bias": (False,),
            "hidden_activation": ("gelu_pytorch_tanh",), "use_bidirectional_attention": (False,),
        },
        layer_shapes.gemma,
    ),
    "mamba": Backbone(
        "Mamba", _MAMBA, {**_SILU, "layer_norm_epsilon": (1e-5,)}, layer_shapes.mamba, _mamba_sizes,
        _MAMBA_SIZES, (), body="backbone", embedding="embeddings", norm="norm_f",
        reorderings={"layers.*.mixer.conv1d.weight": _SEQUENCE},
    ),
    "mamba2": Backbone(
        "Mamba-2", _MAMBA_2, {**_SILU, "layer_norm_epsilon": (1e-5,)}, layer_shapes.mamba2,
        _mamba_2_sizes, _MAMBA_2_SIZES, ("layer_norm_epsilon",), body="backbone",
        embedding="embeddings", norm="norm_f",
        reorderings={"layers.*.mixer.conv1d.weight": _SEQUENCE},
    ),
}  # fmt: skip
EMBEDDINGS = sorted({family.embedding for family in BACKBONES.values()})


def text_config(
    text: Sizes, config: Sizes, where: Path, has_head: bool, has_head_bias: bool
) -> dict[str, Any]:
    """The language model's part of our config.json, from the part `text` of a published `config`.

    `has_head` and `has_head_bias` say whether the files hold an output layer, and its bias. Sizes
    are not checked yet. Raises UserError for what mlx-lm does not compute.
    """
    kind = text.get("model_type", "llama")
    family = BACKBONES[kind]
    values = {**family.defaults, **{k: v for k, v in text.items() if v is not None}}
    for name, allowed in family.supported.items():
        if values.get(name, allowed[0]) not in allowed:
            raise UserError(
                f"{where}: {name} of {kind} is {quoted(values[name])}; mlx-lm has {allowed[0]!r}"
            )
    values |= family.derived(values, where)
    if "rope_theta" in family.numbers:
        values |= _rotation(values, kind, where)
    tied = values.get("tie_word_embeddings", config.get("tie_word_embeddings", False))
    flags = {name: bool(values[name]) for name in family.flags}
    names = (*family.sizes, *family.numbers, *(["rope_scaling"] if family.rotations else []))
    return {
        **{name: values.get(name) for name in names}, **flags, "model_type": kind, "runner": RUNNER,
        "tie_word_embeddings": bool(tied) and not has_head, "lm_head_bias": has_head_bias,
    }  # fmt: skip


def _rotation(c: Sizes, kind: str, where: Path) -> dict[str, Any]:
    """The fields of rotary positions, which transformers 5 writes in one place and 4 in two."""
    place = "rope_parameters" if c.get("rope_parameters") else "rope_scaling"
    rope = c.get(place) or {}
    form = str(rope.get("rope_type", rope.get("type", "default"))) if type(rope) is dict else ""
    names = () if form == "default" else BACKBONES[kind].rotations.get(form)
    if names is None or not all(is_positive(rope.get(name)) for name in names):
        raise UserError(f"{where}: {place} of {kind} is {quoted(rope)}, which is not supported")
    share = "partial_rotary_factor"
    return {
        "rope_theta": rope.get("rope_theta", c.get("rope_theta", 10000.0)),
        share: rope.get(share, c.get(share, 1.0)),
        "rope_scaling": {"rope_type": form, **{n: rope[n] for n in names}} if names else None,
    }


def language_shapes(c: Sizes) -> Shapes:
    """Every tensor of a language model with this text_config of ours."""
    family = BACKBONES[c["model_type"]]
    prefix, D, V = f"language.{family.body}", c["hidden_size"], c["vocab_size"]
    model: Shapes = {f"{prefix}.{family.embedding}.weight": (V, D)}
    layer = family.layer(c)
    for i in range(c["num_hidden_layers"]):
        model |= {f"{prefix}.layers.{i}.{name}": shape for name, shape in layer.items()}
    model |= norm(f"{prefix}.{family.norm}", D, family.has_norm_bias)
    if not c["tie_word_embeddings"]:
        model |= linear("language.lm_head", V, D, c["lm_head_bias"])
    return model


def naming_rules(c: Sizes, text: str, head: str) -> Table:
    """The published names of these tensors: the language model's begin with `text`, its output
    layer's with `head`."""
    family, rules = BACKBONES[c["model_type"]], []
    prefix = f"language.{family.body}."
    for name in language_shapes({**c, "num_hidden_layers": 1}):
        ours = name.replace(".layers.0.", ".layers.*.")
        if ours.startswith(prefix):
            rest = ours.removeprefix(prefix)
            rules.append(Rule(f"{text}.{rest}", ours, family.reorderings.get(rest)))
        else:
            rules.append(Rule(f"{head}.{ours.rpartition('.')[2]}", ours))
    return tuple(rules)


def check_text_config(part: Fields) -> None:
    """UserError for an impossible size, number or flag of our text_config."""
    c, kind = part.values, part.get("model_type")
    if kind not in [*BACKBONES]:
        raise UserError(f"{part.file}: mlx-lm's {quoted(kind)} is none of {', '.join(BACKBONES)}")
    family = BACKBONES[kind]
    for name in family.sizes:
        part.whole_number(name)
    for name in family.numbers:
        part.positive(name)
    for name in (*family.flags, "tie_word_embeddings", "lm_head_bias"):
        part.flag(name)
    if c.get("rope_scaling") is not None:
        _rotation(c, kind, part.file)
    if family.sizes is not _ATTENTION_SIZES:
        if "num_heads" in family.sizes:
            _check_heads_of_scan(part)
        return
    share = "partial_rotary_factor"
    turned = int(c["head_dim"] * (c[share] if share in family.numbers else 1))
    if c["num_attention_heads"] % c["num_key_value_heads"] or turned % 2 or turned > c["head_dim"]:
        raise UserError(f"{part.file}: {part.name}'s heads do not divide evenly")


def _check_heads_of_scan(part: Fields) -> None:
    """UserError where Mamba-2's heads do not make up its inner size, or its groups."""
    c = part.values
    heads = c["num_heads"]
    if heads * c["head_dim"] != c["intermediate_size"] or heads % c["n_groups"]:
        raise UserError(
            f"{part.file}: {part.name} has {heads} heads of {c['head_dim']} in"
            f" {c['n_groups']} groups, which do not divide {c['intermediate_size']} evenly"
        )
