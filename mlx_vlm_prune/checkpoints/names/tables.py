"""The tables of tensor names: left what was published, right ours.

`*` is a number, of a layer or an expert. The way back is derived from the same tables.
A change says where values lie in another order; it has a way back, too.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from .value_order import CONVOLUTION, INTERLEAVED, PATCHES, Change


@dataclass(frozen=True)
class Rule:
    """One line of a table; `change` is what becomes of the values, if they lie otherwise."""

    published: str
    ours: str
    change: Change | None = None


Table = tuple[Rule, ...]


def _same(published: str, ours: str, names: str) -> list[Rule]:
    return [Rule(f"{published}.{name}", f"{ours}.{name}") for name in names.split()]


def _both(names: str) -> str:
    """Each name with a weight and a bias."""
    return " ".join(f"{name}.weight {name}.bias" for name in names.split())


LLAMA = (  # MiniMind2 since April 2025 and MiniMind-3: as Hugging Face's Llama, Qwen3, Qwen3Moe
    *_same("model", "language", "embed_tokens.weight"),
    *_same(
        "model.layers.*",
        "language.layers.*",
        "self_attn.q_proj.weight self_attn.k_proj.weight self_attn.v_proj.weight "
        "self_attn.o_proj.weight self_attn.q_norm.weight self_attn.k_norm.weight "
        "input_layernorm.weight post_attention_layernorm.weight "
        "mlp.gate_proj.weight mlp.down_proj.weight mlp.up_proj.weight mlp.gate.weight "
        "mlp.experts.*.gate_proj.weight mlp.experts.*.down_proj.weight "
        "mlp.experts.*.up_proj.weight mlp.shared_experts.*.gate_proj.weight "
        "mlp.shared_experts.*.down_proj.weight mlp.shared_experts.*.up_proj.weight",
    ),
    *_same("model", "language", "norm.weight"),
)
_EARLY_LAYER = {
    "attention.wq": ("self_attn.q_proj", INTERLEAVED),
    "attention.wk": ("self_attn.k_proj", INTERLEAVED),
    "attention.wv": ("self_attn.v_proj", None),
    "attention.wo": ("self_attn.o_proj", None),
    "attention_norm": ("input_layernorm", None),
    "ffn_norm": ("post_attention_layernorm", None),
    "feed_forward.gate": ("mlp.gate", None),
}
_EARLY_MLP = {
    "feed_forward": "mlp",
    "feed_forward.experts.*": "mlp.experts.*",
    "feed_forward.shared_experts": "mlp.shared_experts.0",
}
EARLY = (  # MiniMind2 from February to April 2025
    Rule("tok_embeddings.weight", "language.embed_tokens.weight"),
    *[
        Rule(f"layers.*.{theirs}.weight", f"language.layers.*.{ours}.weight", change)
        for theirs, (ours, change) in _EARLY_LAYER.items()
    ],
    *[
        Rule(f"layers.*.{theirs}.w{n}.weight", f"language.layers.*.{ours}.{name}_proj.weight")
        for theirs, ours in _EARLY_MLP.items()
        for n, name in ((1, "gate"), (2, "down"), (3, "up"))
    ],
    Rule("norm.weight", "language.norm.weight"),
)
LINEAR = (
    *_same("vision_proj.vision_proj.0", "projector", "weight bias"),
    Rule("vision_proj.pool_queries", "pruner.queries"),  # EfficientVLM's learned pooling
    *[
        Rule(f"vision_proj.pool_{x}_proj.{kind}", f"pruner.{x}_proj.{kind}")
        for x in "qkv"
        for kind in ("weight", "bias")
    ],
)
MLP = (
    *_same("vision_proj.mlp.0", "projector.fc1", "weight bias"),
    *_same("vision_proj.mlp.2", "projector.fc2", "weight bias"),
)
NORMED_MLP = (
    *_same("vision_proj.mlp.0", "projector.norm", "weight bias"),
    *_same("vision_proj.mlp.1", "projector.fc1", "weight bias"),
    *_same("vision_proj.mlp.3", "projector.fc2", "weight bias"),
)
_PATCH = "embeddings.patch_embedding.weight"
_LAYERS = _same(
    "vision_model.encoder.layers.*",
    "tower.encoder.layers.*",
    _both(
        "self_attn.k_proj self_attn.v_proj self_attn.q_proj self_attn.out_proj "
        "layer_norm1 mlp.fc1 mlp.fc2 layer_norm2"
    ),
)
CLIP = (
    *_same("vision_model", "tower", "embeddings.class_embedding"),
    Rule(f"vision_model.{_PATCH}", f"tower.{_PATCH}", CONVOLUTION),
    *_same("vision_model", "tower", "embeddings.position_embedding.weight"),
    *_same("vision_model", "tower", _both("pre_layrnorm")),  # sic
    *_LAYERS,
    *_same("vision_model", "tower", _both("post_layernorm")),
)
_SIGLIP_REST = (
    *_same("vision_model", "tower", "embeddings.patch_embedding.bias"),
    *_same("vision_model", "tower", "embeddings.position_embedding.weight"),
    *_LAYERS,
    *_same("vision_model", "tower", _both("post_layernorm")),
)
SIGLIP = (Rule(f"vision_model.{_PATCH}", f"tower.{_PATCH}", CONVOLUTION), *_SIGLIP_REST)
NAFLEX = (Rule(f"vision_model.{_PATCH}", f"tower.{_PATCH}", PATCHES), *_SIGLIP_REST)


def to_ours(table: Table, name: str) -> tuple[str, Rule] | None:
    """Our name of a published tensor, and its rule; None where the table has none."""
    return _rename(_patterns(table, False), name)


def to_published(table: Table, name: str) -> tuple[str, Rule] | None:
    """The published name of one of our tensors, and its rule."""
    return _rename(_patterns(table, True), name)


def published_order(table: Table, names: Iterable[str]) -> list[str]:
    """Published names in the order of the model that they were published from."""
    first: dict[str, int] = {}  # of the rules that share a beginning up to a star, the first
    for i, rule in enumerate(table):
        for star in re.finditer(r"\*", rule.published):
            first.setdefault(rule.published[: star.start()], i)
        first.setdefault(rule.published, i)

    def key(name: str) -> list[int]:
        found = to_ours(table, name)
        assert found, name
        pattern, order = found[1].published, []
        stars = [star.start() for star in re.finditer(r"\*", pattern)]
        for at, number in zip(stars, numbers(pattern, name), strict=True):
            order += [first[pattern[:at]], number]
        return [*order, first[pattern]]

    return sorted(names, key=key)


def numbers(pattern: str, name: str) -> list[int]:
    """What stands at the stars."""
    found = _compiled(pattern).fullmatch(name)
    assert found, (pattern, name)
    return [int(number) for number in found.groups()]


def _rename(patterns: Sequence[tuple[re.Pattern[str], str, Rule]], name: str):
    for pattern, template, rule in patterns:
        if found := pattern.fullmatch(name):
            for number in found.groups():
                template = template.replace("*", number, 1)
            return template, rule
    return None


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\*", "(0|[1-9][0-9]{0,5})"))


@cache
def _patterns(table: Table, back: bool) -> list[tuple[re.Pattern[str], str, Rule]]:
    if back:
        return [(_compiled(rule.ours), rule.published, rule) for rule in table]
    return [(_compiled(rule.published), rule.ours, rule) for rule in table]
