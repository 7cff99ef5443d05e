"""Adapters in a model of mlx-vlm's, by mlx-vlm's own layers and in its files.

mlx-vlm leaves out whatever does not fit; here that is an error.
"""

import re
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn

from ..checkpoints.adapters import CONFIG, WEIGHTS, AdapterConfig
from ..checkpoints.errors import UserError, reason, whole_reason
from ..checkpoints.reading.paths import LARGEST_JSON, check_regular
from ..checkpoints.reading.weights import check_learned
from ..models.adapters import adapted, adapters
from ..models.arrays import read_arrays


def load_adapters(model: Any, folder: str | Path) -> None:
    """Give a model the adapters in a folder. Raises UserError where they do not fit it."""
    from mlx_vlm.trainer import apply_lora_layers

    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"{folder} holds no {name}, so no adapters")
    check_regular(folder / CONFIG, LARGEST_JSON)
    check_learned(folder / WEIGHTS)
    weights = read_arrays(folder / WEIGHTS)
    try:
        apply_lora_layers(model, folder)
    except Exception as problem:  # whatever comes
        text = whole_reason(problem)
        raise UserError(f"the adapters in {folder} do not fit this model: {text}") from None
    expected = expected_shapes(model)
    for name in sorted(expected.keys() | weights.keys()):
        here = expected.get(name)
        there = weights[name].shape if name in weights else None
        if here != there:
            raise UserError(
                f"the adapters in {folder} do not fit this model: {name} is {there} in the"
                f" file, and {here} in the model"
            )
    model.eval()
    mx.eval(model.parameters())


def add_adapters(model: Any, config: AdapterConfig) -> None:
    """Give the language model adapters that change nothing yet; all else is frozen.

    Raises UserError where keys name nothing that can have one.
    """
    from mlx_vlm.trainer import get_peft_model

    p, names = config.lora_parameters, dict[str, str]()  # of all matrices, within their layers
    layers = set()
    for name, module in model.named_modules():
        match = re.fullmatch(r"(language_model\..*?layers)\.(\d+)\.(.+)", name)
        if match and isinstance(module, nn.Linear | nn.QuantizedLinear):
            layers.add(int(match[2]))
            names[name] = match[3]
    first = max(layers, default=0) + 1 - config.num_layers if config.num_layers > 0 else 0
    keys = config.keys(set(names.values()))
    chosen = [
        name
        for name, inner in names.items()
        if inner in keys and int(re.findall(r"layers\.(\d+)", name)[0]) >= first
    ]
    rank = p["rank"]
    try:
        get_peft_model(
            model, chosen, rank=rank, alpha=p["scale"] * rank, dropout=p["dropout"],
            verbose=False, use_dora=config.fine_tune_type == "dora",
        )  # fmt: skip
    except ValueError as problem:
        raise UserError(f"mlx-vlm adds no such adapters: {reason(problem)}") from None


def adapter_config(model: Any) -> dict[str, Any]:
    """What mlx-vlm needs to add the adapters of a model again."""
    config: dict[str, Any] = model._vlm_adapter_config
    return config


def expected_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Of the tensors that the adapters of a model have; their rank is that of `lora_b`'s rows."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in adapters(model):
        base = adapted(module)
        out, dims = base.weight.shape[-2:]
        if "scales" in base:
            dims = dims * 32 // base.bits
        if "embedding" in module:
            out, dims = dims, out
        rank = len(module.lora_b)
        shapes |= {f"{name}.lora_a": (dims, rank), f"{name}.lora_b": (rank, out)}
        if "m" in module:
            shapes[f"{name}.m"] = (out,)
    return shapes
