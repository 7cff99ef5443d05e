"""`to-mlx -q`: the language model in few bits, as mlx-lm does it; the tower only if asked for.

Every matrix becomes whole numbers of `bits` bits, with a scale (and, in the mode `affine`, a bias)
for each group of `group_size` inputs. `mx.quantize` computes them tensor by tensor: this is the
one file here that needs MLX.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from mlx_vlm_prune.checkpoints.checkpoint import DTYPES, Checkpoint
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.checkpoints.layer_shapes import Shapes
from mlx_vlm_prune.checkpoints.quantization import (
    MODES,
    PARTS,
    Quantization,
    packed,
    packing,
)
from mlx_vlm_prune.checkpoints.reading.tensors import RawTensor


def quantised(
    checkpoint: Checkpoint,
    bits: int | None = None,
    group_size: int | None = None,
    mode: str = "affine",
    dtype: str | None = None,
    tower: bool = False,
) -> Checkpoint:
    """The checkpoint with its language model in few bits; nothing is computed yet.

    With `tower` the vision tower's layers are, too. `dtype` is what scales and biases are in.
    Raises UserError for sizes that do not go together, and for a checkpoint that is quantized
    already.
    """
    if "quantization" in checkpoint.config:
        raise UserError("the source is quantized already; dequantize it first")
    settings: dict[str, Any] = {"mode": mode} | ({"tower": True} if tower else {})
    for name, value, allowed in (
        ("bits", bits, MODES[mode][0]),
        ("group_size", group_size, MODES[mode][1]),
    ):
        if value not in (None, *allowed):
            raise UserError(f"{mode} has {name} {' or '.join(map(str, allowed))}, not {value}")
        settings[name] = value or allowed[0]
    tensors: dict[str, RawTensor] = {}
    for name, tensor in checkpoint.tensors.items():
        tensor = tensor.astype(DTYPES[dtype]) if dtype else tensor
        shapes = packed({name: tensor.shape}, Quantization(**settings))
        tensors |= _pack(shapes, tensor, packing(settings)) if len(shapes) > 1 else {name: tensor}
    if len(tensors) == len(checkpoint.tensors):
        group = settings["group_size"]
        raise UserError(f"no matrix of the language model has rows that groups of {group} divide")
    config = {**checkpoint.config, "quantization": settings, "quantization_config": settings}
    return replace(checkpoint, config=config, tensors=tensors)


def packed_share(checkpoint: Checkpoint) -> str:
    """Which parts of a quantized checkpoint are in few bits, and what is left, in a line."""
    settings, tensors = checkpoint.config["quantization"], checkpoint.tensors
    full = {name: tensor.nbytes / 1e6 for name, tensor in tensors.items()}
    size = sum(full.values())
    for name in [name for name in tensors if name.endswith(".scales")]:
        for part in PARTS:
            full.pop(f"{name.removesuffix('scales')}{part}", None)
    left = f"{sum(full.values()):.1f} of {size:.1f} MB stay as they are"
    if settings.get("tower"):
        return f"the language model and the tower are in {settings['bits']} bits; {left}"
    tower = sum(nbytes for name, nbytes in full.items() if name.startswith("tower."))
    return (
        f"the language model is in {settings['bits']} bits; {left}, {tower:.1f} MB of them the"
        " tower (--q-tower quantizes it, too)"
    )


def _pack(shapes: Shapes, tensor: RawTensor, settings: Mapping[str, Any]) -> dict[str, RawTensor]:
    """The two or three tensors that take a matrix' place."""
    import mlx.core as mx

    from mlx_vlm_prune.models.arrays import to_array, to_bytes

    def compute() -> list[np.ndarray]:
        with mx.stream(mx.cpu):
            parts = [to_bytes(part) for part in mx.quantize(to_array(tensor), **settings)]
        tensor.forget()
        return parts

    dtypes = ("U32", tensor.dtype if settings["mode"] == "affine" else "U8", tensor.dtype)
    take = _computed_once(compute)
    return {
        name: RawTensor(dtypes[i], shape, partial(take, i))
        for i, (name, shape) in enumerate(shapes.items())
    }


def _computed_once(compute: Callable[[], list[np.ndarray]]) -> Callable[[int], np.ndarray]:
    """A function that returns result i: all are computed at the first call, each is kept until it
    is returned."""
    results: dict[int, np.ndarray] = {}

    def take(i: int) -> np.ndarray:
        if i not in results:
            results.update(enumerate(compute()))
        return results.pop(i)

    return take
