"""The generations (releases) of MiniMind-V: their names, and the tensors each is known by.

Their weights look alike and mean different things: one loaded as another gives nonsense
without an error. Names and shapes tell them apart.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..config import CLIP_TYPE, NAFLEX_TYPE, SIGLIP_TYPE
from ..errors import UserError
from ..names.rules import Table, to_ours
from ..names.towers import CLIP, NAFLEX, SIGLIP
from ..reading.tensors import Shaped
from .tables import EARLY, LINEAR, LLAMA, MLP, NORMED_MLP

KV_HEADS = 2  # of every published MiniMind2; the number is in no file


@dataclass(frozen=True)
class Generation:
    """One layout of published weights, and what its files leave open."""

    name: str
    title: str
    language: Table
    projector: Table
    tower: Table
    tied: tuple[str, str]  # stored twice: the output layer, and the embedding that we keep
    model_type: str
    tower_type: str
    image_token: str
    text_fields: dict[str, Any]  # of text_config, the same in every model
    experts_per_tok: int
    merge: tuple[int, int] = (1, 1)  # patches, down and across, that become one visual token
    kv_heads: int | None = None  # assumed, since no file has the number
    transformers_classes: dict[str, str] = field(default_factory=dict)  # for the language model

    @property
    def table(self) -> Table:
        return self.language + self.projector + self.tower


_LLAMA_TIE = ("lm_head.weight", "model.embed_tokens.weight")
_SECOND = Generation(
    "minimind2-v",
    "MiniMind2-V of April 2025 to February 2026",
    language=LLAMA,
    projector=LINEAR,
    tower=CLIP,
    tied=_LLAMA_TIE,
    model_type="minimind2_v",
    tower_type=CLIP_TYPE,
    image_token="@",
    text_fields={"rms_norm_eps": 1e-05},
    experts_per_tok=2,
    kv_heads=KV_HEADS,
    transformers_classes={"dense": "LlamaForCausalLM"},
)
_EARLY = replace(
    _SECOND,
    name="minimind2-v-2025-02",
    title="MiniMind2-V of February to April 2025",
    language=EARLY,
    tied=("output.weight", "tok_embeddings.weight"),
)
_THIRD = Generation(
    "minimind-3v",
    "MiniMind-3V since 20 April 2026",
    language=LLAMA,
    projector=NORMED_MLP,
    tower=SIGLIP,
    tied=_LLAMA_TIE,
    model_type="minimind3_v",
    tower_type=SIGLIP_TYPE,
    image_token="<|image_pad|>",
    text_fields={"rms_norm_eps": 1e-06, "qk_norm": True},
    experts_per_tok=1,
    transformers_classes={"dense": "Qwen3ForCausalLM", "experts": "Qwen3MoeForCausalLM"},
)
_MERGED = replace(
    _THIRD, name="minimind-3v-2026-04-19", title="MiniMind-3V of 19 April 2026", merge=(2, 2)
)
_NAFLEX = replace(
    _THIRD,
    name="minimind-3v-2026-03",
    title="MiniMind-3V of March 2026",
    projector=MLP,
    tower=NAFLEX,
    tower_type=NAFLEX_TYPE,
    merge=(1, 4),
)
GENERATIONS = {each.name: each for each in (_EARLY, _SECOND, _NAFLEX, _MERGED, _THIRD)}
SUPPORTED = ", ".join(each.title for each in GENERATIONS.values())
DEFAULT = "minimind2-v"  # of a folder of ours whose config.json has no published_as


def recognise(state: Mapping[str, Shaped], where: Path) -> Generation:
    """The generation of a state dict without masks; UserError that says what it is instead."""
    if "tok_embeddings.weight" in state:
        return _recognise_early(state, where)
    if "model.embed_tokens.weight" not in state:
        raise UserError(f"{where} holds no language model of MiniMind-V; supported are {SUPPORTED}")
    has_qk_norm = any(name.endswith(".self_attn.q_norm.weight") for name in state)
    projector = {name for name in state if name.startswith("vision_proj.")}
    if any(
        name.startswith(("vision_proj.vision_proj.", "vision_proj.pool_")) for name in projector
    ):
        if has_qk_norm:
            raise UserError(
                f"{where} mixes MiniMind-3's language model with MiniMind2-V's projector"
            )
        _check_no_scorer(projector, where)
        return _SECOND
    if not projector:
        language_model = "MiniMind-3" if has_qk_norm else "MiniMind2"
        raise UserError(
            f"{where} is {language_model}'s language model alone, without vision_proj: it cannot"
            " see; to train it to, give tower to train, or convert it with a tower by python -m"
            " convert to-mlx --projector-seed"
        )
    if not has_qk_norm:
        raise UserError(f"{where} mixes MiniMind2's language model with MiniMind-3V's projector")
    return _recognise_third(state)


def _recognise_early(state: Mapping[str, Shaped], where: Path) -> Generation:
    both = (state.get(f"layers.0.attention.w{x}.weight") for x in "qk")
    q_rows, k_rows = (tensor.shape[0] if tensor and tensor.shape else 0 for tensor in both)
    if q_rows and q_rows == 2 * k_rows:
        raise UserError(
            f"{where} is minimind-v-v1 of 2024, which is not supported: it reads 50 tokens of CLIP"
            " ViT-B/32, CLS among them, in a prompt format that was given up"
        )
    return _EARLY


def _recognise_third(state: Mapping[str, Shaped]) -> Generation:
    if "vision_proj.mlp.3.weight" not in state:
        return _NAFLEX
    norm = state.get("vision_proj.mlp.0.weight")
    patch = state.get("vision_model.embeddings.patch_embedding.weight")
    width = patch.shape[0] if patch and patch.shape else 768
    merged = norm is not None and norm.shape == (4 * width,)
    return _MERGED if merged else _THIRD


def _check_no_scorer(projector: Collection[str], where: Path) -> None:
    for name in sorted(projector):
        if not to_ours(LINEAR, name) and re.search(r"scor|prun", name):
            raise UserError(
                f"{where} holds {name}, of an EfficientVLM scorer; its layout was never published,"
                " so attention_pool is the learned pruning that can be converted"
            )
