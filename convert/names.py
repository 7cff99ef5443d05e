"""The one table of tensor names: left MiniMind2-V's and Hugging Face CLIP's, right ours.

`*` is a layer's number. The way back is derived from the same table. A convolution's
axes differ: PyTorch has (out, in, height, width), MLX (out, height, width, in).
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

CONVOLUTION = (0, 2, 3, 1)


@dataclass(frozen=True)
class Rule:
    """One line of the table; `axes` is the order of the published axes in ours, if it differs."""

    published: str
    ours: str
    axes: tuple[int, ...] | None = None

    @property
    def axes_back(self) -> tuple[int, ...] | None:
        """The order that undoes `axes`."""
        return self.axes and tuple(sorted(range(len(self.axes)), key=self.axes.__getitem__))


def _same(published: str, ours: str, names: str) -> list[Rule]:
    return [Rule(f"{published}.{name}", f"{ours}.{name}") for name in names.split()]


def _both(names: str) -> str:
    """Each name with a weight and a bias."""
    return " ".join(f"{name}.weight {name}.bias" for name in names.split())


LANGUAGE = [
    *_same("model", "language", "embed_tokens.weight"),
    *_same(
        "model.layers.*",
        "language.layers.*",
        "self_attn.q_proj.weight self_attn.k_proj.weight self_attn.v_proj.weight "
        "self_attn.o_proj.weight input_layernorm.weight post_attention_layernorm.weight "
        "mlp.gate_proj.weight mlp.down_proj.weight mlp.up_proj.weight",
    ),
    *_same("model", "language", "norm.weight"),
]
PROJECTOR = [
    *_same("vision_proj.vision_proj.0", "projector", "weight bias"),
    Rule("vision_proj.pool_queries", "pruner.queries"),
    *[
        Rule(f"vision_proj.pool_{x}_proj.{kind}", f"pruner.{x}_proj.{kind}")
        for x in "qkv"
        for kind in ("weight", "bias")
    ],
]
TOWER = [
    *_same("vision_model", "tower", "embeddings.class_embedding"),
    Rule(
        "vision_model.embeddings.patch_embedding.weight",
        "tower.embeddings.patch_embedding.weight",
        CONVOLUTION,
    ),
    *_same("vision_model", "tower", "embeddings.position_embedding.weight"),
    *_same("vision_model", "tower", _both("pre_layrnorm")),  # sic
    *_same(
        "vision_model.encoder.layers.*",
        "tower.encoder.layers.*",
        _both(
            "self_attn.k_proj self_attn.v_proj self_attn.q_proj self_attn.out_proj "
            "layer_norm1 mlp.fc1 mlp.fc2 layer_norm2"
        ),
    ),
    *_same("vision_model", "tower", _both("post_layernorm")),
]
TABLE = [*LANGUAGE, *PROJECTOR, *TOWER]
TIED = ("lm_head.weight", "model.embed_tokens.weight")  # published twice, kept once


def to_ours(name: str) -> tuple[str, Rule] | None:
    """Our name of a published tensor, and its rule; None where the table has none."""
    return _rename(name, back=False)


def to_published(name: str) -> tuple[str, Rule] | None:
    """The published name of one of our tensors, and its rule."""
    return _rename(name, back=True)


def published_order(names: Iterable[str]) -> list[str]:
    """Published names as MiniMind2-V's state dict has them: embedding, layers, norm, projector."""
    place = {rule.published: i for i, rule in enumerate(TABLE)}
    first: dict[str, int] = {}  # of the rules that repeat per layer, the first one's place
    for name, i in place.items():
        first.setdefault(name.partition("*")[0], i)

    def key(name: str) -> tuple[int, int, int]:
        found = to_ours(name)
        assert found, name
        rule, layer = found[1].published, re.search(r"\.layers\.(\d+)\.", name)
        return first[rule.partition("*")[0]], int(layer[1]) if layer else 0, place[rule]

    return sorted(names, key=key)


def _rename(name: str, back: bool) -> tuple[str, Rule] | None:
    for pattern, template, rule in _patterns(back):
        if found := pattern.fullmatch(name):
            return template.replace("*", found[1] if found.groups() else ""), rule
    return None


@cache
def _patterns(back: bool) -> list[tuple[re.Pattern[str], str, Rule]]:
    made = []
    for rule in TABLE:
        source, target = (rule.ours, rule.published) if back else (rule.published, rule.ours)
        number = re.escape(source).replace(r"\*", "(0|[1-9][0-9]*)")
        made.append((re.compile(number), target, rule))
    return made
