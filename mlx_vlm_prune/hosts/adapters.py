"""Adapters in a model of mlx-vlm's, by mlx-vlm's own layers and in its files.

mlx-vlm leaves out whatever does not fit; here that is an error.
"""

from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn

from ..checkpoints.errors import UserError
from ..models.adapters import CONFIG, WEIGHTS, adapted, adapters
from ..models.arrays import read_arrays


def load_adapters(model: Any, folder: str | Path) -> None:
    """Give a model the adapters in a folder. Raises UserError where they do not fit it."""
    from mlx_vlm.trainer import apply_lora_layers

    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"{folder} holds no {name}, so no adapters")
    weights = read_arrays(folder / WEIGHTS)
    try:
        apply_lora_layers(model, folder)
    except Exception as problem:  # whatever comes
        text = " ".join((str(problem).strip() or type(problem).__name__).split())
        raise UserError(f"the adapters in {folder} do not fit this model: {text}") from None
    expected = expected_shapes(model)
    for name in sorted(expected.keys() | weights.keys()):
        here = expected.get(name)
        there = weights[name].shape if name in weights else None
        if here != there:
            raise UserError(
                f"the adapters in {folder} do not fit this model: {name} is {there} there, and"
                f" {here} here"
            )
    model.eval()
    mx.eval(model.parameters())


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
