"""Reads the checkpoint in a folder, whichever family it is of: ours, MiniMind-V or LLaVA.

There are three: a folder of our own, as `convert to-mlx` writes it; a LLaVA as published; and a
MiniMind-V as published.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .checkpoint import LEARNED_FILE, Checkpoint
from .config import CONFIG, LLAVA_TYPE, MODEL_TYPES, VLMConfig, parse_config
from .errors import UserError, quoted
from .llava import published as llava
from .llava.layouts import LAYOUTS, Layout
from .minimind import published as minimind
from .minimind.generations import DEFAULT, GENERATIONS, Generation
from .processor import preprocessor_folder
from .reading.files import optional_json, read_json
from .reading.paths import is_here
from .reading.tensors import RawTensor
from .reading.weights import check_learned, read_weights
from .shapes import check_complete

OF_MINIMIND = ("llama", "qwen3", "qwen3_moe")  # as its language model is published for transformers


def read_checkpoint(
    source: Path,
    vision: Path | None = None,
    tokenizer: Path | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    projector_seed: int | None = None,
) -> Checkpoint:
    """The checkpoint in a file or folder of any family; its tensors stay on the disk.

    `vision` is the folder of a tower that lies apart, `tokenizer` that of tokenizer.json; without
    them they are looked for in or beside `source`. With `projector_seed`, MiniMind's language model
    alone gets an untrained projector to its tower. Raises UserError.
    """
    if is_ours(source):
        return _our_checkpoint(source, tokenizer)
    if llava.is_llava_folder(source):
        return llava.read_checkpoint(source, vision, tokenizer)
    try:
        return minimind.read_checkpoint(source, vision, tokenizer, heads, kv_heads, projector_seed)
    except UserError:
        if (kind := foreign_kind(source)) is None:
            raise
        raise UserError(
            f"{source} is a {kind} model; MiniMind-V and LLaVA models are what can be converted"
        ) from None


def foreign_kind(folder: Path) -> str | None:
    """The model_type in a folder's config.json, where it is of another family than a MiniMind-V's
    or a LLaVA's."""
    kind = optional_json(folder / CONFIG).get("model_type")
    if not isinstance(kind, str) or not kind.isprintable() or kind in OF_MINIMIND:
        return None
    if "minimind" in kind or is_ours(folder) or llava.is_llava_folder(folder):
        return None
    return kind[:60]


def is_ours(folder: Path) -> bool:
    """Is this one of our own checkpoint folders?"""
    return optional_json(folder / CONFIG).get("model_type") in MODEL_TYPES


def is_llava(config: Mapping[str, Any]) -> bool:
    """Is this config.json of ours a LLaVA-style model's, rather than a MiniMind-V's?"""
    return config.get("model_type") == LLAVA_TYPE


def published_layout(config: Mapping[str, Any], where: Path) -> Any:
    """How the model in one of our folders was published: a MiniMind-V's `Generation`, or a LLaVA's
    `Layout`."""
    layouts: Mapping[str, Generation | Layout] = LAYOUTS if is_llava(config) else GENERATIONS
    name = config.get("published_as", None if is_llava(config) else DEFAULT)
    if not isinstance(name, str) or name not in layouts:
        raise UserError(f"{where}: published_as is {quoted(name)}, none of {', '.join(layouts)}")
    return layouts[name]


def read_ours(folder: Path) -> tuple[dict[str, Any], VLMConfig, dict[str, RawTensor]]:
    """config.json, the same parsed, and the tensors of one of our folders that is not quantized.

    Raises UserError.
    """
    if not is_ours(folder):
        raise UserError(f"{folder} is none of our checkpoint folders (see to-mlx)")
    config, sizes, tensors = _read_and_check(folder)
    if sizes.quantization:
        raise UserError(f"{folder} is quantized; dequantize it by to-mlx first")
    return config, sizes, tensors


def _our_checkpoint(folder: Path, tokenizer: Path | None) -> Checkpoint:
    config, _, tensors = _read_and_check(folder)
    learned_file = folder / LEARNED_FILE
    if is_here(learned_file):
        check_learned(learned_file)
    return Checkpoint(
        config, tensors, tokenizer or folder, preprocessor_folder(folder),
        learned_file=learned_file if learned_file.is_file() else None, carried_folder=folder,
    )  # fmt: skip


def _read_and_check(folder: Path) -> tuple[dict[str, Any], VLMConfig, dict[str, RawTensor]]:
    config = read_json(folder / CONFIG)
    published_layout(config, folder)
    sizes, tensors = parse_config(config, folder / CONFIG), read_weights(folder)
    check_complete(tensors, sizes, folder)
    return config, sizes, tensors
