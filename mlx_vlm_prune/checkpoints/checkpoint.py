"""Checkpoints whole, as they are read: MiniMind-V as published, and ours.

Published: a .pth (or a folder with one, or with Hugging Face's weight files), the
vision tower in a folder of its own, and the tokenizer in another. Ours: one folder.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .config import CONFIG, POOL, VLMConfig, parse_config, parse_sizes
from .errors import UserError
from .llava import composed as llava
from .llava import original as llava_original
from .llava.names import LAYOUTS
from .minimind.generations import DEFAULT, GENERATIONS, MODEL_TYPES, Generation, recognise
from .names.renaming import as_ours, as_published, check_tied, renamed
from .names.tables import LLAMA, NAFLEX, SIGLIP
from .processor import (
    ADVICE,
    TOKENIZER,
    TOKENIZER_CONFIG,
    read_tokenizer,
    reading_in,
    special_tokens,
)
from .reading.files import optional_json, read_json
from .reading.tensors import RawTensor
from .reading.weights import read_weights
from .shapes import check_complete
from .sizes import text_config, tidy, vision_config

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
LEARNED = "pruners.safetensors"
TOWER_PLACES = (
    "clip",
    "clip-vit-base-patch16",
    "vision_model/clip-vit-base-patch16",
    "siglip",
    "siglip2-base-p32-256-ve",
    "siglip2-base-p16-256-ve",
    "siglip2-base-p16-ve",
)


@dataclass(frozen=True)
class Published:
    """A published checkpoint under our names and in our layout.

    `raw` is what the file holds, under its names. `sizes` has text_config and, where they are,
    vision_config, projector and pruner. `tower` is the folder that the tower
    lies in, where that is apart, and `reading` that of preprocessor_config.json. `guessed` says
    that nothing gives the number of heads.
    """

    raw: dict[str, RawTensor]
    tensors: dict[str, RawTensor]
    sizes: dict[str, Any]
    generation: Generation
    tower: Path | None
    reading: Path | None
    guessed: bool


@dataclass(frozen=True)
class Source:
    """Everything that goes into one of our folders, and the folders the rest of it lies in."""

    config: dict[str, Any]
    tensors: dict[str, RawTensor]
    tokenizer: Path
    reading: Path | None
    guessed: bool = False  # how many heads there are
    learned: Path | None = None  # weights of learned pruners, which lie beside a model of ours
    twig: Mapping[str, RawTensor] = field(default_factory=dict)  # goes with them
    beside: Path | None = None  # where files lie that are carried along


def is_ours(folder: Path) -> bool:
    """Is this one of our own checkpoint folders?"""
    return optional_json(folder / CONFIG).get("model_type") in MODEL_TYPES


def read_published(
    source: Path,
    vision: Path | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
) -> Published:
    """Read a .pth or a folder with weights, and the tower from `vision` or a folder beside them.

    Raises UserError, naming file and tensor, for whatever is missing or does not fit.
    """
    published = open_published(source, vision, heads, kv_heads)
    if "vision_config" not in published.sizes:
        raise UserError(
            f"{source} holds no vision tower (MiniMind-V is published without one); give the"
            " folder of its CLIP or SigLIP with --vision"
        )
    check_tied(published.raw, *published.generation.tied, source)
    check_complete(published.tensors, parse_sizes(published.sizes, source), source)
    return published


def open_published(
    source: Path,
    vision: Path | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
) -> Published:
    """The same of one that may lack its tower or other tensors; only names and shapes are read."""
    raw, home = read_weights(source), source if source.is_dir() else source.parent
    whole = tidy(raw)
    state = {name: tensor for name, tensor in whole.items() if not is_tower(name)}
    beside = next((home / place for place in TOWER_PLACES if (home / place).is_dir()), None)
    folder, tower, given = vision or beside, whole.keys() - state.keys(), {}
    apart = folder if vision or not tower else None  # a training checkpoint has its own
    if apart:
        whole = state | {k: v for k, v in tidy(read_weights(apart)).items() if is_tower(k)}
        given = read_json(apart / CONFIG)
    generation = recognised(whole, source)  # some differ by the tower's width alone
    table, title = generation.table, generation.title
    rest = {name: tensor for name, tensor in state.items() if name != generation.tied[0]}
    seen = {name: tensor for name, tensor in whole.items() if is_tower(name)}
    ours = renamed(rest, table, title, source)
    heads, kv_heads = _heads(source, heads, kv_heads)
    text = text_config(ours, generation, source, heads, kv_heads)
    ours |= renamed(seen, table, title, folder or source)
    ours = as_ours(ours, table, text["hidden_size"] // text["num_attention_heads"])
    sizes: dict[str, Any] = {"text_config": text}
    if seen or apart:
        sizes["vision_config"] = vision_config(ours, generation.tower_type, given, folder or source)
    if "projector.fc1.weight" in ours:
        norm = "projector.norm.weight" in ours
        sizes["projector"] = {"merge": list(generation.merge), "norm": norm}
    if queries := ours.get("pruner.queries"):
        sizes["pruner"] = {"name": POOL, "tokens": queries.shape[0] if queries.shape else 0}
    guessed = not (heads or kv_heads or text.get("qk_norm"))
    return Published(raw, ours, sizes, generation, apart, reading_in(folder, home), guessed)


def recognised(state: Mapping[str, RawTensor], where: Path) -> Generation:
    """The generation of a state dict; UserError that says what it is instead."""
    generation = recognise(state)
    if isinstance(generation, str):
        raise UserError(f"{where} {generation}")
    return generation


def _heads(source: Path, heads: int | None, kv_heads: int | None) -> tuple[int | None, int | None]:
    """As given, or as a Hugging Face folder's config.json says."""
    if heads or kv_heads:
        return heads, kv_heads
    given = optional_json(source / CONFIG)
    both = [given.get(f"num_{name}_heads") for name in ("attention", "key_value")]
    heads, kv_heads = (n if type(n) is int and 0 < n <= 1024 else None for n in both)
    return heads, kv_heads


def torch_tensors(published: Published, head_dim: int) -> dict[str, RawTensor]:
    """The same in PyTorch's layout, under the names of the latest release of its family."""
    generation = published.generation
    tower = SIGLIP if generation.tower == NAFLEX else generation.tower
    table = LLAMA + generation.projector + tower
    return as_published(published.tensors, table, head_dim, Path())


def as_mlx(
    source: Path,
    vision: Path | None = None,
    tokenizer: Path | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
) -> Source:
    """A published checkpoint, or a folder of ours, as what goes into one: nothing is written.

    Without `vision` and `tokenizer` they are looked for in or beside `source`. Raises UserError.
    """
    if is_ours(source):
        config, _, tensors = _own(source)
        learned = source / LEARNED if (source / LEARNED).is_file() else None
        return Source(
            config, tensors, tokenizer or source, reading_in(source), learned=learned, beside=source
        )
    if llava.is_published(source):
        return _composed(source, vision, tokenizer or source)
    published = read_published(source, vision, heads, kv_heads)
    generation = published.generation
    words = tokenizer or (source if source.is_dir() else source.parent)
    config = {
        **_words(words, generation),
        **published.sizes,
        "model_type": generation.model_type,
        "published_as": generation.name,
        "torch_dtype": _precision(published.tensors),
    }
    return Source(config, published.tensors, words, published.reading, published.guessed)


def _composed(source: Path, vision: Path | None, words: Path) -> Source:
    """A LLaVA-style model as Hugging Face has it, or as its authors do."""
    state, tower = llava_original.parts(source, vision)
    config, tensors = llava.composed(state, source, tower)
    config |= {"torch_dtype": _precision(tensors)} | llava.words(config["published"], words)
    return Source(config, tensors, words, reading_in(tower, source), beside=source)


def is_tower(name: str) -> bool:
    return name.startswith("vision_model.")


def _words(folder: Path, generation: Generation) -> dict[str, Any]:
    """What config.json says of the tokenizer."""
    tokenizer, image = read_tokenizer(folder, ADVICE), generation.image_token
    token = tokenizer.token_to_id(image)
    if token is None:
        raise UserError(
            f"{folder / TOKENIZER} has no token {image!r}, the place for an image in"
            f" {generation.title}"
        )
    end = special_tokens(optional_json(folder / TOKENIZER_CONFIG)).get("eos_token")
    end_id = None if end is None else tokenizer.token_to_id(end)
    return {"eos_token_id": end_id, "image_token": image, "image_token_id": token}


def published_as(config: Mapping[str, Any], where: Path) -> Any:
    """As what one of our folders was published: a Generation, or the Layout of a LLaVA."""
    able = LAYOUTS if is_composed(config) else GENERATIONS
    name = config.get("published_as", None if is_composed(config) else DEFAULT)
    if not isinstance(name, str) or name not in able:
        raise UserError(f"{where}: published_as is {name!r}, none of {', '.join(able)}")
    return able[name]


def is_composed(config: Mapping[str, Any]) -> bool:
    """Is it of a LLaVA-style model, rather than of a MiniMind-V?"""
    return config.get("model_type") == llava.MODEL_TYPE


def read_ours(folder: Path) -> tuple[dict[str, Any], VLMConfig, dict[str, RawTensor]]:
    """config.json, its sizes, and the tensors of one of our folders that is not quantized.

    Raises UserError.
    """
    if not is_ours(folder):
        raise UserError(f"{folder} is none of our checkpoint folders (see to-mlx)")
    config, sizes, tensors = _own(folder)
    if sizes.quantization:
        raise UserError(f"{folder} is quantized; convert it to-mlx with --dequantize first")
    return config, sizes, tensors


def _own(folder: Path) -> tuple[dict[str, Any], VLMConfig, dict[str, RawTensor]]:
    config = read_json(folder / CONFIG)
    published_as(config, folder)
    sizes, tensors = parse_config(config, folder / CONFIG), read_weights(folder)
    check_complete(tensors, sizes, folder)
    return config, sizes, tensors


def _precision(tensors: Mapping[str, RawTensor]) -> str:
    """What the language model is in, as config.json says it."""
    code = next(tensor.dtype for name, tensor in tensors.items() if name.startswith("language."))
    return next(name for name, each in DTYPES.items() if each == code)
