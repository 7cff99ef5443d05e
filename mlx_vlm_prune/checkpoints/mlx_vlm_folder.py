"""A model that mlx-vlm runs as it is, as far as its config.json tells."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .config import CONFIG
from .llava import composed as llava
from .minimind.generations import MODEL_TYPES
from .reading.files import optional_json, read_json

RECORD = "mlx_vlm_prune"  # in the config.json of a folder that prune-into made
TOWERS = ("clip", "siglip", "siglip2")  # have a vision_config too, and say nothing


def is_one(folder: Path) -> bool:
    """Is this a vision-language model, and none that is converted?"""
    told = optional_json(folder / CONFIG)
    kind = told.get("model_type")
    if not isinstance(kind, str) or kind in (*MODEL_TYPES, *TOWERS):
        return False
    if RECORD in told:
        return True
    if llava.is_published(folder):
        return not llava.is_for_us(folder)
    return isinstance(told.get("vision_config"), Mapping)


def lines(folder: Path) -> list[tuple[str, str]]:
    """What `inspect` says of it."""
    told = read_json(folder / CONFIG)
    kind = _plain(told["model_type"])
    said = [("model", f"{kind}, for mlx-vlm, if it knows this kind: nothing is to be converted")]
    inner = told.get("text_config")
    text: Mapping[str, Any] = inner if isinstance(inner, Mapping) else told
    layers, width = (text.get(name) for name in ("num_hidden_layers", "hidden_size"))
    if type(layers) is int and type(width) is int:
        said += [("language model", f"{layers} layers of {width}")]
    how = told.get("quantization")
    if isinstance(how, Mapping) and {"bits", "group_size"} <= {*how}:
        bits, size = _plain(how["bits"]), _plain(how["group_size"])
        said += [("quantized", f"{bits} bits, groups of {size}")]
    if "model_file" in told:
        said += [("executes", f"{_plain(told['model_file'])}, whenever mlx-vlm loads this folder")]
    if RECORD not in told:
        return [*said, ("to prune it", f"generate --model {folder} --pruner NAME")]
    return [*said, *_of_record(told[RECORD])]


def _of_record(made: Any) -> list[tuple[str, str]]:
    """What prune-into wrote down, as far as it can still be read."""
    made = made if isinstance(made, Mapping) else {}
    pruner, kept = made.get("pruner"), made.get("keep_tokens") or made.get("keep_ratio")
    if pruner is None or kept is None:
        return [("pruned by", "convert prune-into, but the record of how is damaged")]
    keeps = f"{_plain(pruner)}, which keeps {_plain(kept)} of an image's visual tokens"
    return [("pruned by", keeps)]


def _plain(value: Any) -> str:
    """As a terminal may show it: the file is anybody's."""
    return "".join(c for c in str(value)[:60] if c.isprintable())
