"""Folders of models that mlx-vlm runs as they are, as far as their config.json tells."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .config import CONFIG, MODEL_TYPES
from .llava import published as llava
from .reading.files import optional_json, read_json

RECORD = "mlx_vlm_prune"  # field of the config.json of a folder that prune-into made
TOWERS_ALONE = ("clip", "siglip", "siglip2")  # these have a vision_config, but no language model


def is_mlx_vlm(folder: Path) -> bool:
    """Is this a vision-language model, but none that is for us to convert or to run?"""
    config = optional_json(folder / CONFIG)
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind in (*MODEL_TYPES, *TOWERS_ALONE):
        return False
    if RECORD in config:
        return True
    if llava.is_llava_folder(folder):
        return not llava.is_for_our_decoder(folder)
    return isinstance(config.get("vision_config"), Mapping)


def describe_mlx_vlm(folder: Path) -> list[tuple[str, str]]:
    """The lines that `inspect` prints: headings, and their texts."""
    config = read_json(folder / CONFIG)
    kind = _printable(config["model_type"])
    lines = [("model", f"{kind}, for mlx-vlm, if it knows this kind: nothing is to be converted")]
    part = config.get("text_config")
    text: Mapping[str, Any] = part if isinstance(part, Mapping) else config
    layers, width = (text.get(name) for name in ("num_hidden_layers", "hidden_size"))
    if type(layers) is int and type(width) is int:
        lines += [("language model", f"{layers} layers of {width}")]
    quantization = config.get("quantization")
    if isinstance(quantization, Mapping) and {"bits", "group_size"} <= {*quantization}:
        bits, size = (_printable(quantization[field]) for field in ("bits", "group_size"))
        lines += [("quantized", f"{bits} bits, groups of {size}")]
    if "model_file" in config:
        file = _printable(config["model_file"])
        lines += [("executes", f"{file}, whenever mlx-vlm loads this folder")]
    if RECORD in config:
        return [*lines, ("pruned by", _describe_record(config[RECORD]))]
    return [*lines, ("to prune it", f"generate --model {folder} --pruner NAME")]


def _describe_record(record: Any) -> str:
    """What prune-into wrote down, as far as it can still be read."""
    record = record if isinstance(record, Mapping) else {}
    pruner, kept = record.get("pruner"), record.get("keep_tokens") or record.get("keep_ratio")
    if pruner is None or kept is None:
        return "convert prune-into, but the record of how is damaged"
    return f"{_printable(pruner)}, which keeps {_printable(kept)} of an image's visual tokens"


def _printable(value: Any) -> str:
    """The first characters of a value from an untrusted file that are safe on a terminal."""
    return "".join(c for c in str(value)[:60] if c.isprintable())
