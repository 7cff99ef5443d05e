"""LLaVA-style models as published: a tower, a projector and a language model.

Written by transformers or by LLaVA's authors (original.py). config.json has every size, or leaves
it to the default of the class it names; the tensors are compared with it.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..backbones import BACKBONES
from ..checkpoint import Checkpoint, language_dtype
from ..config import CONFIG, LLAVA_TYPE, is_clip, parse_sizes
from ..errors import UserError, quoted
from ..names.renaming import check_tied, to_our_names, to_our_order, to_published_layout
from ..processor import TOKENIZER, TOKENIZER_ADVICE, preprocessor_folder, read_tokenizer
from ..reading.fields import LARGEST, Fields
from ..reading.files import optional_json, read_header, read_json
from ..reading.paths import is_here
from ..reading.tensors import RawTensor
from ..reading.weights import has_weights, weight_files
from ..shapes import check_complete
from . import original
from .layouts import LAYOUTS, Layout, recognise
from .sizes import TOWER_DEFAULTS, text_config, vision_config

PUBLISHED_TYPE = "llava"  # model_type in transformers' and mlx-vlm's config.json
TRANSFORMERS_CLASS = "LlavaForConditionalGeneration"
HEAD = "language.lm_head.weight"
# Buffers, and the pooling head of SigLIP, which no LLaVA reads.
UNUSED = re.compile(
    r".*\.(position_ids|rotary_emb\.inv_freq)|.*vision_tower\.(vision_model\.)?head\..*"
)


def is_llava_folder(folder: Path) -> bool:
    """Does this folder's config.json say that a LLaVA-style model is in it?

    Its authors, transformers and mlx-vlm all write that: see `is_for_our_decoder`.
    """
    config = optional_json(folder / CONFIG)
    return config.get("model_type") == PUBLISHED_TYPE or original.is_original(config)


def is_for_our_decoder(folder: Path) -> bool:
    """Is the LLaVA in this folder one for our own decoder, rather than for mlx-vlm?

    The rule stands here only. Ours is what LLaVA's authors wrote of a Llama, which mlx-vlm does not
    read, and what transformers wrote, if we have its kinds of language model (some are mlx-lm's to
    compute) and of tower. Anything else is left to mlx-vlm: what mlx-vlm converted, a Mistral, a
    Pixtral, Apple's FastVLM, a folder without weights.

    Only headers are read. Raises UserError for a file that is no sound safetensors.
    """
    config = read_json(folder / CONFIG)
    if original.is_original(config):
        return config.get("model_type") in original.TYPES
    for part, kinds in (("text_config", BACKBONES), ("vision_config", TOWER_DEFAULTS)):
        values = config.get(part)
        if isinstance(values, Mapping):
            kind = values.get("model_type", next(iter(kinds)))
            if kind not in [*kinds]:
                return False
    return has_weights(folder) and _is_by_transformers(folder)


def _is_by_transformers(folder: Path) -> bool:
    """Did transformers write these weights, rather than mlx-vlm?

    The convolution that makes patches decides: transformers' is (D, 3, patch, patch), mlx-vlm's
    (D, patch, patch, 3). Where both fit, the metadata decide: {"format": "mlx"} is mlx-vlm's, "pt"
    or none transformers'. A pytorch_model.bin is always transformers'.
    """
    formats = set()
    for file in weight_files(folder):
        if file.suffix != ".safetensors":
            continue
        shapes, framework = read_header(file)
        formats.add(framework)
        for name, shape in shapes.items():
            if name.endswith("patch_embedding.weight") and len(shape) == 4:
                _, first, _, last = shape
                if (first == 3) is not (last == 3):
                    return first == 3
    return "mlx" not in formats


def read_checkpoint(source: Path, vision: Path | None, tokenizer: Path | None) -> Checkpoint:
    """A published LLaVA and its tokenizer; UserError for what is missing or does not fit."""
    state, tower_folder = original.read_state(source, vision)
    tokenizer = tokenizer or source
    lacks_tower = original.is_original_folder(source) and original.lacks_tower(state)
    if lacks_tower and not is_here(tokenizer / TOKENIZER):
        raise UserError(
            f"{original.tower_advice(source)}; there is no {tokenizer / TOKENIZER} either"
            f"{TOKENIZER_ADVICE}"
        )
    config, tensors = config_and_tensors(state, source, tower_folder)
    config |= {"torch_dtype": language_dtype(tensors)}
    config |= _token_fields(config["published"], tokenizer)
    preprocessor = preprocessor_folder(tower_folder, source)
    return Checkpoint(config, tensors, tokenizer, preprocessor, carried_folder=source)


def config_and_tensors(
    state: Mapping[str, RawTensor], folder: Path, tower_folder: Path | None = None
) -> tuple[dict[str, Any], dict[str, RawTensor]]:
    """Our config.json, but for the tokenizer's fields, and the tensors under our names.

    `tower_folder` is where the tower's tensors came from, if they lie apart.
    Raises UserError, naming file and field or tensor, for what does not fit.
    """
    layout, sizes = _layout_and_sizes(state, folder, tower_folder)
    config = parse_sizes(sizes, folder / CONFIG)
    table = layout.table(is_clip(sizes["vision_config"]), sizes["text_config"])
    used = {name: tensor for name, tensor in state.items() if not UNUSED.fullmatch(name)}
    tensors = to_our_order(to_our_names(used, table, layout.title, folder), table, 1)
    if sizes["text_config"]["tie_word_embeddings"]:
        check_tied(tensors, HEAD, "language.embed_tokens.weight", folder)
        tensors.pop(HEAD, None)
    check_complete(tensors, config, folder)
    published = {"published": read_json(folder / CONFIG), "published_as": layout.name}
    return {**sizes, "model_type": LLAVA_TYPE, **published}, tensors


def _layout_and_sizes(
    state: Mapping[str, RawTensor], folder: Path, tower_folder: Path | None
) -> tuple[Layout, dict[str, Any]]:
    """How the tensors are named, and the parts of our config.json that are sizes."""
    where, is_linear = folder / CONFIG, False
    config = read_json(where)
    if original.is_original(config):
        is_linear = config.get("mm_projector_type", "linear") == "linear"
        config = original.as_transformers(state, folder, tower_folder)
    elif not _is_by_transformers(folder):
        raise UserError(
            f"{folder} is a LLaVA that mlx-vlm converted: it is loaded as it is, and only one as"
            " transformers wrote it can be converted"
        )
    layout = recognise(state)
    if layout is None:
        raise UserError(
            f"{folder}: its config.json says llava, but its tensors lie as in none of"
            f" {', '.join(LAYOUTS)}"
        )
    if config.get("projector_hidden_act", "gelu") != "gelu":
        raise UserError(
            f"{where}: projector_hidden_act is {quoted(config['projector_hidden_act'])}, not gelu"
        )
    text = Fields(config, where).part("text_config").values
    has_head, has_head_bias = (f"{layout.head}.{kind}" in state for kind in ("weight", "bias"))
    sizes = {
        "text_config": text_config(text, config, where, has_head, has_head_bias),
        "vision_config": vision_config(config, where),
    }
    return layout, sizes if is_linear else {"projector": {"merge": [1, 1], "norm": False}, **sizes}


def _token_fields(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The fields of our config.json about the tokenizer in a folder."""
    tokenizer, file = read_tokenizer(folder, TOKENIZER_ADVICE), folder / TOKENIZER
    if original.is_original(config):
        return original.token_fields(tokenizer, config, file)
    number = config.get("image_token_index", config.get("image_token_id", 32000))
    is_id = type(number) is int and 0 <= number <= LARGEST
    token = tokenizer.id_to_token(number) if is_id else None
    if token is None:
        raise UserError(
            f"{file} has no token {quoted(number)}, the place for an image in config.json"
        )
    return {"image_token": token, "image_token_id": number}


def published_tensors(
    tensors: Mapping[str, RawTensor], layout: Layout, config: Mapping[str, Any], where: Path
) -> dict[str, RawTensor]:
    """Our tensors under the names of a layout, and in its order; `config` is our config.json."""
    table = layout.table(is_clip(config["vision_config"]), config["text_config"])
    return to_published_layout(tensors, table, 1, where)


def published_config(config: Mapping[str, Any], where: Path) -> Mapping[str, Any]:
    """The config.json that one of our folders was published with."""
    return Fields(config, where / CONFIG).part("published").values
