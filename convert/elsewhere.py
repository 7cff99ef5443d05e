"""A model that mlx-vlm runs as it is, as far as its config.json tells."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import llava
from .files import read_json
from .generations import MODEL_TYPES

RECORD = "mlx_vlm_prune"  # in the config.json of a folder that prune-into made
TOWERS = ("clip", "siglip", "siglip2")  # have a vision_config too, and say nothing


def is_one(folder: Path) -> bool:
    """Is this a vision-language model, and none that is converted?"""
    file = folder / "config.json"
    told = read_json(file) if file.is_file() else {}
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
    told = read_json(folder / "config.json")
    kind = _plain(told["model_type"])
    said = [("model", f"{kind}, which mlx-vlm runs: nothing is to be converted")]
    inner = told.get("text_config")
    text: Mapping[str, Any] = inner if isinstance(inner, Mapping) else told
    layers, width = (text.get(name) for name in ("num_hidden_layers", "hidden_size"))
    if type(layers) is int and type(width) is int:
        said += [("language model", f"{layers} layers of {width}")]
    how = told.get("quantization")
    if isinstance(how, Mapping):
        said += [
            (
                "quantized",
                f"{_plain(how.get('bits'))} bits, groups of {_plain(how.get('group_size'))}",
            )
        ]
    made = told.get(RECORD)
    if not isinstance(made, Mapping):
        return [*said, ("to prune it", f"generate --model {folder} --pruner NAME")]
    kept = _plain(made.get("keep_tokens") or made.get("keep_ratio"))
    return [
        *said,
        (
            "pruned by",
            f"{_plain(made.get('pruner'))}, which keeps {kept} of an image's visual tokens",
        ),
        ("executes", f"{_plain(told.get('model_file'))}, whenever mlx-vlm loads this folder"),
    ]


def _plain(value: Any) -> str:
    """As a terminal may show it: the file is anybody's."""
    return "".join(c for c in str(value)[:60] if c.isprintable())
