"""Language models that mlx-lm computes, below a LLaVA: sizes, names and shapes of their tensors.

Our own decoder is Llama's and Qwen2's as both are usually written; what it leaves out (other
rotations, biases and head sizes, other families) is mlx-lm's to compute. Under `language.` the
tensors are called as mlx-lm calls them, which is as Hugging Face does.

Shapes: a tensor's, under its name within a layer.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import UserError
from .names.tables import Rule, Table
from .names.value_order import Change
from .reading.fields import Fields, is_positive

RUNNER = "mlx-lm"  # what text_config.runner says where mlx-lm's modules are driven
Shapes = dict[str, tuple[int, ...]]
Sizes = Mapping[str, Any]


def linear(name: str, rows: int, columns: int, bias: bool = False) -> Shapes:
    return {f"{name}.weight": (rows, columns), **({f"{name}.bias": (rows,)} if bias else {})}


def norm(name: str, size: int, bias: bool = False) -> Shapes:
    return {f"{name}.weight": (size,), **({f"{name}.bias": (size,)} if bias else {})}


def attention(c: Sizes, inner: bool, out: bool, last: str = "o_proj") -> Shapes:
    """Projections, `inner` and `out` of them with biases."""
    D, wide, narrow = c["hidden_size"], *(c[f"num_{x}_heads"] for x in ("attention", "key_value"))
    wide, narrow = wide * c["head_dim"], narrow * c["head_dim"]
    return {
        **linear("self_attn.q_proj", wide, D, inner),
        **linear("self_attn.k_proj", narrow, D, inner),
        **linear("self_attn.v_proj", narrow, D, inner),
        **linear(f"self_attn.{last}", D, wide, out),
    }


def gated(name: str, D: int, inner: int, bias: bool = False) -> Shapes:
    """A network of three matrices."""
    return {
        **linear(f"{name}.gate_proj", inner, D, bias),
        **linear(f"{name}.up_proj", inner, D, bias),
        **linear(f"{name}.down_proj", D, inner, bias),
    }


def norms(D: int) -> Shapes:
    """Those before attention and before the network."""
    return norm("input_layernorm", D) | norm("post_attention_layernorm", D)


def qk_norms(d: int) -> Shapes:
    return norm("self_attn.q_norm", d) | norm("self_attn.k_norm", d)


def _gated(c: Sizes, bias: bool = False) -> Shapes:
    D = c["hidden_size"]
    return gated("mlp", D, c["intermediate_size"], bias) | norms(D)


def _llama(c: Sizes) -> Shapes:
    bias = c["attention_bias"]
    return attention(c, bias, bias) | _gated(c, c["mlp_bias"])


def _qwen2(c: Sizes) -> Shapes:
    return attention(c, True, False) | _gated(c)


def _qwen3(c: Sizes) -> Shapes:
    return attention(c, False, False) | qk_norms(c["head_dim"]) | _gated(c)


def _phi(c: Sizes) -> Shapes:
    D, inner = c["hidden_size"], c["intermediate_size"]
    return {
        **attention(c, True, True, "dense"),
        **linear("mlp.fc1", inner, D, True),
        **linear("mlp.fc2", D, inner, True),
        **norm("input_layernorm", D, True),
    }


def _gemma(c: Sizes) -> Shapes:
    return attention(c, False, False) | _gated(c)


def _mamba(c: Sizes) -> Shapes:
    D, inner, state, rank = (c[k] for k in _SCANNED[:4])
    kernel = {"mixer.conv1d.weight": (inner, c["conv_kernel"], 1)}
    return {
        **linear("mixer.in_proj", 2 * inner, D, c["use_bias"]),
        **kernel, **({"mixer.conv1d.bias": (inner,)} if c["use_conv_bias"] else {}),
        **linear("mixer.x_proj", rank + 2 * state, inner),
        **linear("mixer.dt_proj", inner, rank, True),
        "mixer.A_log": (inner, state), "mixer.D": (inner,),
        **linear("mixer.out_proj", D, inner, c["use_bias"]),
        **norm("norm", D),
    }  # fmt: skip


def _free_heads(told: Sizes, where: Path) -> dict[str, Any]:
    """The size of a head as told, or what each has of hidden_size."""
    groups = told.get("num_key_value_heads") or told.get("num_attention_heads")
    if told.get("head_dim") is not None:
        return {"num_key_value_heads": groups}
    return _equal_heads(told, where)


def _equal_heads(told: Sizes, where: Path) -> dict[str, Any]:
    """The same, of heads that together are as wide as hidden_size."""
    size, heads, own = told["hidden_size"], told["num_attention_heads"], told.get("head_dim")
    whole = type(size) is int and type(heads) is int and heads > 0 and size % heads == 0
    if not whole or own not in (None, size // heads):
        raise UserError(
            f"{where}: {heads} heads of {own or 'equal size'} do not make a hidden_size of {size}"
        )
    groups = told.get("num_key_value_heads") or heads
    return {"num_key_value_heads": groups, "head_dim": size // heads}


def _scanned(told: Sizes, where: Path) -> dict[str, Any]:
    """Mamba's sizes that follow from others."""
    part = Fields(told, where, "text_config")
    size, rank = part.whole("hidden_size"), told["time_step_rank"]
    rank = -(-size // 16) if rank == "auto" else rank
    return {"intermediate_size": int(part.positive("expand") * size), "time_step_rank": rank}


_ATTENDED = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings",
)  # fmt: skip
_SCANNED = (
    "hidden_size", "intermediate_size", "state_size", "time_step_rank", "conv_kernel",
    "num_hidden_layers", "vocab_size",
)  # fmt: skip


@dataclass(frozen=True)
class Backbone:
    """A family: what its class of transformers takes for sizes that config.json leaves out, which
    values mlx-lm has of what else there could be (None: whatever is left out), the tensors of one
    layer, and sizes that follow from others."""

    title: str
    defaults: dict[str, Any]
    fixed: dict[str, tuple]
    layer: Callable[[Sizes], Shapes]
    derived: Callable[[Sizes, Path], dict[str, Any]] = _free_heads
    sizes: tuple[str, ...] = _ATTENDED
    numbers: tuple[str, ...] = ("rms_norm_eps", "rope_theta")
    rotations: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # besides the plain one
    body: str = "model"
    embedding: str = "embed_tokens"
    norm: str = "norm"
    normed_bias: bool = False  # has the last norm one?
    changes: Mapping[str, Change] = field(default_factory=dict)  # of axes that lie otherwise

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
_SILU = {"hidden_act": ("silu",)}
_QWENS = {**_SILU, "use_sliding_window": (False,)}
_LLAMA3 = {
    "llama3": (
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    ),
}  # fmt: skip
# PyTorch's convolutions over a sequence have (out, in, length), MLX's (out, length, in).
_SEQUENCE = Change(
    lambda tensor, d: tensor.permuted((0, 2, 1)), lambda tensor, d: tensor.permuted((0, 2, 1)), 3
)
BACKBONES = {
    "llama": Backbone("Llama", _LLAMA, _SILU, _llama, rotations=_LLAMA3),
    "qwen2": Backbone("Qwen2", _QWEN, _QWENS, _qwen2, _equal_heads),
    "qwen3": Backbone(
        "Qwen3", {**_QWEN, "head_dim": 128}, {**_QWENS, "attention_bias": (False,)}, _qwen3
    ),
    "phi": Backbone(
        "Phi", _PHI, {"hidden_act": ("gelu_new",), "qk_layernorm": (False,)}, _phi, _equal_heads,
        numbers=("layer_norm_eps", "rope_theta", "partial_rotary_factor"),
        norm="final_layernorm", normed_bias=True,
    ),
    "gemma": Backbone(  # "gelu" is an old name of the same
        "Gemma", _GEMMA,
        {
            "hidden_act": ("gelu_pytorch_tanh", "gelu"), "attention_bias": (False,),
            "hidden_activation": ("gelu_pytorch_tanh",), "use_bidirectional_attention": (False,),
        },
        _gemma,
    ),
    "mamba": Backbone(
        "Mamba", _MAMBA, {**_SILU, "layer_norm_epsilon": (1e-5,)}, _mamba, _scanned, _SCANNED, (),
        body="backbone", embedding="embeddings", norm="norm_f",
        changes={"layers.*.mixer.conv1d.weight": _SEQUENCE},
    ),
}  # fmt: skip
EMBEDDINGS = sorted({family.embedding for family in BACKBONES.values()})


def text_config(
    given: Sizes, whole: Sizes, where: Path, has_head: bool, has_bias: bool
) -> dict[str, Any]:
    """The language model's part of our config.json: sizes, and what mlx-lm is told.

    `has_head` and `has_bias` say whether the files hold an output layer of its own, and its
    bias. Sizes are not checked yet. Raises UserError for what mlx-lm computes otherwise.
    """
    kind = given.get("model_type", "llama")
    family = BACKBONES[kind]
    told = {**family.defaults, **{k: v for k, v in given.items() if v is not None}}
    for name, able in family.fixed.items():
        if told.get(name, able[0]) not in able:
            raise UserError(f"{where}: {name} of {kind} is {told[name]!r}; mlx-lm has {able[0]!r}")
    told |= family.derived(told, where)
    if "rope_theta" in family.numbers:
        told |= _rotation(told, kind, where)
    tied = told.get("tie_word_embeddings", whole.get("tie_word_embeddings", False))
    flags = {name: bool(told[name]) for name in family.flags}
    names = (*family.sizes, *family.numbers, *(["rope_scaling"] if family.rotations else []))
    return {
        **{name: told.get(name) for name in names}, **flags, "model_type": kind, "runner": RUNNER,
        "tie_word_embeddings": bool(tied) and not has_head, "lm_head_bias": has_bias,
    }  # fmt: skip


def _rotation(told: Sizes, kind: str, where: Path) -> dict[str, Any]:
    """How positions turn queries and keys; transformers 5 says it in one place, 4 in two."""
    place = "rope_parameters" if told.get("rope_parameters") else "rope_scaling"
    turns = told.get(place) or {}
    form = str(turns.get("rope_type", turns.get("type", "default"))) if type(turns) is dict else ""
    names = () if form == "default" else BACKBONES[kind].rotations.get(form)
    if names is None or not all(is_positive(turns.get(name)) for name in names):
        raise UserError(f"{where}: {place} of {kind} is {turns!r}, which is not supported")
    scaling = {"rope_type": form, **{name: turns[name] for name in names}} if names else None
    return {
        "rope_theta": turns.get("rope_theta", told.get("rope_theta", 10000.0)),
        "partial_rotary_factor": turns.get(
            "partial_rotary_factor", told.get("partial_rotary_factor", 1.0)
        ),
        "rope_scaling": scaling,
    }


def shapes(c: Sizes) -> Shapes:
    """Every tensor of the language model, as text_config asks for."""
    family = BACKBONES[c["model_type"]]
    at, D, V = f"language.{family.body}", c["hidden_size"], c["vocab_size"]
    found: Shapes = {f"{at}.{family.embedding}.weight": (V, D)}
    one = family.layer(c)
    for i in range(c["num_hidden_layers"]):
        found |= {f"{at}.layers.{i}.{name}": shape for name, shape in one.items()}
    found |= norm(f"{at}.{family.norm}", D, family.normed_bias)
    if not c["tie_word_embeddings"]:
        found |= linear("language.lm_head", V, D, c["lm_head_bias"])
    return found


def rules(c: Sizes, text: str, head: str) -> Table:
    """The names of the same tensors where the language model lies under `text`, and its output
    layer is `head`."""
    family, found = BACKBONES[c["model_type"]], []
    at = f"language.{family.body}."
    for name in shapes({**c, "num_hidden_layers": 1}):
        ours = name.replace(".layers.0.", ".layers.*.")
        if ours.startswith(at):
            rest = ours.removeprefix(at)
            found.append(Rule(f"{text}.{rest}", ours, family.changes.get(rest)))
        else:
            found.append(Rule(f"{head}.{ours.rpartition('.')[2]}", ours))
    return tuple(found)


def check(part: Fields) -> None:
    """UserError for a size, number or flag of a text_config of ours that cannot be."""
    c, kind = part.values, part.get("model_type")
    if kind not in [*BACKBONES]:
        raise UserError(f"{part.file}: mlx-lm's {kind!r} is none of {', '.join(BACKBONES)}")
    family = BACKBONES[kind]
    for name in family.sizes:
        part.whole(name)
    for name in family.numbers:
        part.positive(name)
    for name in (*family.flags, "tie_word_embeddings", "lm_head_bias"):
        part.flag(name)
    if c.get("rope_scaling") is not None:
        _rotation(c, kind, part.file)
    if family.sizes is not _ATTENDED:
        return
    share = "partial_rotary_factor"
    turned = int(c["head_dim"] * (c[share] if share in family.numbers else 1))
    if c["num_attention_heads"] % c["num_key_value_heads"] or turned % 2 or turned > c["head_dim"]:
        raise UserError(f"{part.file}: {part.name}'s heads do not divide evenly")
