"""LLaVA-style models: somebody's tower, a projector, and somebody's language model.

What MiniMind-V's files leave out, theirs say: config.json has every size, or means the
default of the class it names. Sizes are taken from there, and the tensors held against them.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import backbones
from ..backbones import BACKBONES
from ..config import CONFIG, TOWERS, is_clip, parse_sizes
from ..errors import UserError
from ..names.renaming import as_ours, as_published, check_tied, renamed
from ..processor import ADVICE, TOKENIZER, read_tokenizer
from ..reading.fields import LARGEST, Fields
from ..reading.files import optional_json, read_header, read_json
from ..reading.tensors import RawTensor
from ..shapes import check_complete
from . import original
from .names import LAYOUTS, Layout, recognise

MODEL_TYPE = "composed_vlm"  # of our folders
PUBLISHED_TYPE = "llava"  # of theirs
READER = "LlavaForConditionalGeneration"
HEAD = "language.lm_head.weight"
PLAIN = (  # what our own decoder is told of a Llama or a Qwen2
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "vocab_size", "rms_norm_eps", "max_position_embeddings",
)  # fmt: skip
_TOWER = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "image_size": 224, "num_channels": 3,
}  # fmt: skip
VISION: dict[str, dict[str, Any]] = {
    "clip_vision_model": {
        **_TOWER, "patch_size": 32, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu",
    },
    "siglip_vision_model": {
        **_TOWER, "patch_size": 16, "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh",
    },
}  # fmt: skip
# Buffers, and the pooling head of SigLIP, which no LLaVA reads.
REST = re.compile(
    r".*\.(position_ids|rotary_emb\.inv_freq)|.*vision_tower\.(vision_model\.)?head\..*"
)


def is_published(folder: Path) -> bool:
    """Does this folder's config.json say that a LLaVA-style model is in it?

    Its authors, transformers and mlx-vlm all write that; `is_for_us` tells what is ours.
    """
    told = optional_json(folder / CONFIG)
    return told.get("model_type") == PUBLISHED_TYPE or original.is_original(told)


def is_for_us(folder: Path) -> bool:
    """Is the LLaVA in this folder one for our own decoder, rather than for mlx-vlm?

    The rule, which is stated here only. Ours is what LLaVA's authors wrote of a Llama, which
    mlx-vlm does not read, and what transformers wrote, if its language model and its tower are
    of kinds that we have (some language models are mlx-lm's to compute); anything else (what
    mlx-vlm converted, a Mistral, a Pixtral, Apple's FastVLM, a folder without weights) is left to
    mlx-vlm. Who wrote the weights is told by the convolution that makes patches: transformers has
    (D, 3, patch, patch), mlx-vlm (D, patch, patch, 3). Where its shape says nothing, the metadata
    do: {"format": "mlx"} is mlx-vlm's, "pt" or none transformers'. A pytorch_model.bin is always
    transformers'.

    Only headers are read. Raises UserError for a file that is no sound safetensors.
    """
    told = read_json(folder / CONFIG)
    if original.is_original(told):
        return told.get("model_type") in original.TYPES
    for part, kinds in (("text_config", BACKBONES), ("vision_config", VISION)):
        given = told.get(part)
        if isinstance(given, Mapping) and given.get("model_type", next(iter(kinds))) not in [
            *kinds
        ]:
            return False
    weights = (*folder.glob("model*.safetensors"), *folder.glob("pytorch_model*.bin"))
    return bool(weights) and _wrote_transformers(folder)


def _wrote_transformers(folder: Path) -> bool:
    """Or else mlx-vlm did."""
    forms = set()
    for file in sorted(folder.glob("model*.safetensors")):
        shapes, form = read_header(file)
        forms.add(form)
        for name, shape in shapes.items():
            if name.endswith("patch_embedding.weight") and len(shape) == 4:
                _, first, _, last = shape
                if (first == 3) is not (last == 3):
                    return first == 3
    return "mlx" not in forms


def composed(
    state: Mapping[str, RawTensor], folder: Path, tower: Path | None = None
) -> tuple[dict[str, Any], dict[str, RawTensor]]:
    """What goes into our config.json (without the tokenizer's part), and tensors under our names.

    `tower` is the folder that the tower's tensors came from, where they lie apart.
    Raises UserError, naming file and field or tensor, for whatever does not fit.
    """
    layout, sizes = sizes_of(state, folder, tower)
    config = parse_sizes(sizes, folder / CONFIG)
    table = layout.table(is_clip(sizes["vision_config"]), sizes["text_config"])
    held = {k: v for k, v in state.items() if not REST.fullmatch(k)}
    ours = as_ours(renamed(held, table, layout.title, folder), table, 1)
    if sizes["text_config"]["tie_word_embeddings"]:
        check_tied(ours, HEAD, "language.embed_tokens.weight", folder)
        ours.pop(HEAD, None)
    check_complete(ours, config, folder)
    whole = {"published": read_json(folder / CONFIG), "published_as": layout.name}
    return {**sizes, "model_type": MODEL_TYPE, **whole}, ours


def sizes_of(
    names: Mapping[str, RawTensor], folder: Path, tower: Path | None = None
) -> tuple[Layout, dict[str, Any]]:
    """The layout of a published folder, and the parts of our config.json that are sizes."""
    where, linear = folder / CONFIG, False
    told = read_json(where)
    if original.is_original(told):
        linear = told.get("mm_projector_type", "linear") == "linear"
        told = original.as_hugging_face(names, folder, tower)
    elif not _wrote_transformers(folder):
        raise UserError(
            f"{folder} is a LLaVA that mlx-vlm converted: --model takes it as it is, and only one"
            " as transformers wrote it can be converted"
        )
    layout = recognise(names)
    if layout is None:
        raise UserError(
            f"{folder}: its config.json says llava, but its tensors lie as in none of"
            f" {', '.join(LAYOUTS)}"
        )
    if told.get("projector_hidden_act", "gelu") != "gelu":
        raise UserError(
            f"{where}: projector_hidden_act is {told['projector_hidden_act']!r}, not gelu"
        )
    head = [f"{layout.head}.{kind}" in names for kind in ("weight", "bias")]
    text = Fields(told, where).part("text_config").values
    return layout, ({} if linear else {"projector": {"merge": [1, 1], "norm": False}}) | {
        "text_config": text_config(text, told, where, *head),
        "vision_config": vision_config(told, where),
    }


def text_config(
    given: Mapping[str, Any], whole: Mapping[str, Any], where: Path,
    has_head: bool = True, has_bias: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """The language model's part of our config.json; UserError for what is computed otherwise.

    What our own decoder does not compute is left to mlx-lm. `has_head` and `has_bias` say whether
    the files hold an output layer, and its bias.
    """
    kind = given.get("model_type", "llama")
    if kind not in [*BACKBONES]:
        raise UserError(
            f"{where}: no language model is called {kind!r}; there are {', '.join(BACKBONES)}"
        )
    told = {"rope_theta": 10000.0, **BACKBONES[kind].defaults, **given}
    told.setdefault("num_key_value_heads", told.get("num_attention_heads"))
    turns = told.get("rope_parameters") or told.get("rope_scaling") or {}
    if not _is_plain(kind, told, turns):
        return backbones.text_config(given, whole, where, has_head, has_bias)
    tied = bool(given.get("tie_word_embeddings", whole.get("tie_word_embeddings", False)))
    return {
        **{name: told[name] for name in PLAIN},
        "attention_bias": kind == "qwen2",
        "model_type": kind,
        "rope_theta": turns.get("rope_theta", told["rope_theta"]),
        "tie_word_embeddings": tied,
    }


def _is_plain(kind: str, told: Mapping[str, Any], turns: Any) -> bool:
    """Is it a Llama or a Qwen2 as our own decoder computes them?"""
    heads, width, size = (told.get(k) for k in ("num_attention_heads", "head_dim", "hidden_size"))
    heads_fit = type(width) is int and type(heads) is int and width * heads == size
    return (
        kind in ("llama", "qwen2")
        and isinstance(turns, Mapping)
        and turns.get("rope_type", turns.get("type", "default")) == "default"
        and told.get("hidden_act", "silu") == "silu"
        and (not told.get("attention_bias") or kind == "qwen2")
        and not told.get("mlp_bias")
        and (width is None or heads_fit)
        and not told.get("use_sliding_window")
    )


def vision_config(told: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """The tower's part of our config.json, with the layer whose features LLaVA reads."""
    given = Fields(told, where).part("vision_config").values
    kind = given.get("model_type", TOWERS[0])
    if kind not in [*VISION]:
        raise UserError(f"{where}: no tower is called {kind!r}; there are {', '.join(VISION)}")
    full, act = {**VISION[kind], **given}, VISION[kind]["hidden_act"]
    if full["hidden_act"] != act:
        raise UserError(f"{where}: hidden_act is {full['hidden_act']!r}; {kind} has {act}")
    clip = kind == TOWERS[0]
    right = "default" if clip else "full"  # SigLIP has no CLS to leave out
    strategy = told.get("vision_feature_select_strategy", "default")
    if strategy != right:
        raise UserError(
            f"{where}: vision_feature_select_strategy is {strategy!r}; {kind} needs {right}"
        )
    layers = Fields(full, where, "vision_config").whole("num_hidden_layers")
    at = told.get("vision_feature_layer", -2)
    run = at if type(at) is not int or at >= 0 else layers + 1 + at
    if type(run) is not int or not 1 <= run <= layers:
        raise UserError(
            f"{where}: vision_feature_layer is {at!r}; one of {layers} layers is supported"
        )
    post = {} if clip else {"post_norm": False}
    names = [name for name in VISION[kind] if name != "num_channels"]
    return {name: full[name] for name in names} | {"feature_layers": run, "model_type": kind} | post


def words(told: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What our config.json says of the tokenizer in a folder."""
    tokenizer, file = read_tokenizer(folder, ADVICE), folder / TOKENIZER
    if original.is_original(told):
        return original.words(tokenizer, told, file)
    number = told.get("image_token_index", told.get("image_token_id", 32000))
    able = type(number) is int and 0 <= number <= LARGEST
    token = tokenizer.id_to_token(number) if able else None
    if token is None:
        raise UserError(f"{file} has no token {number!r}, the place for an image in config.json")
    return {"image_token": token, "image_token_id": number}


def published(
    tensors: Mapping[str, RawTensor], layout: Layout, config: Mapping[str, Any], where: Path
) -> dict[str, RawTensor]:
    """Our tensors under the names of a layout, and in its order."""
    table = layout.table(is_clip(config["vision_config"]), config["text_config"])
    return as_published(tensors, table, 1, where)


def published_config(config: Mapping[str, Any], where: Path) -> Mapping[str, Any]:
    """The config.json that one of our folders was published with."""
    return Fields(config, where / CONFIG).part("published").values
