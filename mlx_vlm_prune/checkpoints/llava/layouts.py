"""How LLaVA-style models name their tensors, release by release.

A layout's table follows from where its language model, projector and tower lie. `*` is the number
of a layer.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..backbones import EMBEDDINGS, RUNNER, naming_rules
from ..names.rules import Rule, Table
from ..names.towers import CLIP, SIGLIP

_LAYER = (
    "self_attn.q_proj.weight self_attn.k_proj.weight self_attn.v_proj.weight "
    "self_attn.q_proj.bias self_attn.k_proj.bias self_attn.v_proj.bias self_attn.o_proj.weight "
    "mlp.gate_proj.weight mlp.up_proj.weight mlp.down_proj.weight "
    "input_layernorm.weight post_attention_layernorm.weight"
).split()
_TWO = {"projector.fc1": "linear_1", "projector.fc2": "linear_2"}
_ONE_OR_TWO = {"projector": "", "projector.fc1": ".0", "projector.fc2": ".2"}


@dataclass(frozen=True)
class Layout:
    """What the names of each part begin with. A tower may lie in a folder of its own."""

    name: str
    title: str
    text: str
    head: str
    projector: dict[str, str]
    tower: str

    def table(self, clip: bool, text: Mapping[str, Any] | None = None) -> Table:
        """The names of a model with CLIP's tower, or else SigLIP's; `text` is our text_config."""
        if text and text.get("runner") == RUNNER:
            language = naming_rules(text, self.text, self.head)
        else:
            language = _language_table(self.text, self.head)
        projector = [
            Rule(f"{published}.{kind}", f"{ours}.{kind}")
            for ours, published in self.projector.items()
            for kind in ("weight", "bias")
        ]
        return (*language, *projector, *tower_table(self.tower, clip))


def _language_table(text: str, head: str) -> Table:
    layers = [Rule(f"{text}.layers.*.{name}", f"language.layers.*.{name}") for name in _LAYER]
    begin = Rule(f"{text}.embed_tokens.weight", "language.embed_tokens.weight")
    end = Rule(f"{text}.norm.weight", "language.norm.weight")
    return (begin, *layers, end, Rule(f"{head}.weight", "language.lm_head.weight"))


def tower_table(prefix: str, clip: bool) -> Table:
    """The table of CLIP's tower or SigLIP's, published names beginning with `prefix`."""
    return tuple(
        Rule(prefix + rule.published.removeprefix("vision_model"), rule.ours, rule.reordering)
        for rule in (CLIP if clip else SIGLIP)
    )


def _transformers_layout(name: str, inner: bool, flat: bool) -> Layout:
    """`inner`: as the module calls its parts, under model; `flat`: no vision_model in between."""
    before = "model." if inner else ""
    return Layout(
        name,
        "a LLaVA-style model in Hugging Face's layout",
        f"{before}language_model" if inner else "language_model.model",
        "lm_head" if inner else "language_model.lm_head",
        {a: f"{before}multi_modal_projector.{b}" for a, b in _TWO.items()},
        f"{before}vision_tower" + ("" if flat else ".vision_model"),
    )


# As transformers 5.4.0 saves it: it puts its old names into the new ones.
_OLD_IN_NEW = replace(
    _transformers_layout("llava-hf-old-inner", inner=True, flat=False),
    text="model.language_model.model", head="language_model.lm_head",
)  # fmt: skip
LAYOUTS = {
    layout.name: layout
    for layout in (
        _transformers_layout("llava-hf", inner=False, flat=False),  # transformers 4, and the hub
        _transformers_layout("llava-hf-flat", inner=False, flat=True),  # saved by transformers 5
        _transformers_layout("llava-hf-inner", inner=True, flat=False),
        _transformers_layout("llava-hf-inner-flat", inner=True, flat=True),
        _OLD_IN_NEW,
    )
}
ORIGINAL = {  # as its authors publish it, its tower inside or in a folder of its own
    name: Layout(
        name, "a LLaVA-1.5 in its authors' layout", "model", "lm_head",
        {a: f"model.mm_projector{b}" for a, b in _ONE_OR_TWO.items()}, tower_at,
    )
    for name, tower_at in (
        ("llava", "model.vision_tower.vision_tower.vision_model"),
        ("llava-apart", "vision_model"),
    )
}  # fmt: skip
LAYOUTS |= ORIGINAL
# torch_ref's own names of the same parts.
REFERENCE = Layout(
    "reference", "", "model", "model.lm_head",
    {
        "projector": "vision_proj.vision_proj.0",
        "projector.fc1": "vision_proj.mlp.0", "projector.fc2": "vision_proj.mlp.2",
    },
    "vision_encoder.vision_model",
)  # fmt: skip


def recognise(names: Collection[str]) -> Layout | None:
    """The layout of a state dict; None where it is none of these."""
    for layout in LAYOUTS.values():
        embeddings = (f"{layout.text}.{name}.weight" for name in EMBEDDINGS)
        has_tower = f"{layout.tower}.post_layernorm.weight" in names
        if has_tower and any(name in names for name in embeddings):
            return layout
    return None
