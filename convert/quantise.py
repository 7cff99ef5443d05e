"""Fewer bits for the language model, as mlx-lm users know it; tower, projector, pruner stay.

Every matrix W is kept as whole numbers of `bits` bits, with a scale (and, in the mode
`affine`, a bias) for each group of `group_size` inputs. The one file here that needs MLX,
whose own `mx.quantize` does it, tensor by tensor.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from mlx_vlm_prune.checkpoints.backbones import Shapes
from mlx_vlm_prune.checkpoints.checkpoint import DTYPES, Source
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.checkpoints.quantization import MODES, Quantization, packed
from mlx_vlm_prune.checkpoints.reading.tensors import RawTensor

PARTS = ("weight", "scales", "biases")


def quantised(
    source: Source,
    bits: int | None = None,
    group_size: int | None = None,
    mode: str = "affine",
    dtype: str | None = None,
) -> Source:
    """The source with its language model in few bits; nothing is computed yet.

    `dtype` is what scales and biases are in. Raises UserError for sizes that do not go
    together, and for a source that is quantized already.
    """
    if "quantization" in source.config:
        raise UserError("the source is quantized already; --dequantize it first")
    how: dict[str, Any] = {"mode": mode}
    for name, given, allowed in (
        ("bits", bits, MODES[mode][0]),
        ("group_size", group_size, MODES[mode][1]),
    ):
        if given not in (None, *allowed):
            raise UserError(f"{mode} has {name} {' or '.join(map(str, allowed))}, not {given}")
        how[name] = given or allowed[0]
    tensors: dict[str, RawTensor] = {}
    for name, tensor in source.tensors.items():
        tensor = tensor.astype(DTYPES[dtype]) if dtype else tensor
        shapes = packed({name: tensor.shape}, Quantization(**how))
        tensors |= _few_bits(shapes, tensor, how) if len(shapes) > 1 else {name: tensor}
    if len(tensors) == len(source.tensors):
        group = how["group_size"]
        raise UserError(f"no matrix of the language model has rows that groups of {group} divide")
    config = {**source.config, "quantization": how, "quantization_config": how}
    return replace(source, config=config, tensors=tensors)


def _few_bits(shapes: Shapes, tensor: RawTensor, how: Mapping[str, Any]) -> dict[str, RawTensor]:
    """The two or three tensors that take a matrix' place."""
    import mlx.core as mx

    from mlx_vlm_prune.models.arrays import to_array, to_bytes

    def compute() -> list[np.ndarray]:
        with mx.stream(mx.cpu):
            made = [to_bytes(part) for part in mx.quantize(to_array(tensor), **how)]
        tensor.forget()
        return made

    kinds = ("U32", tensor.dtype if how["mode"] == "affine" else "U8", tensor.dtype)
    each = _one_at_a_time(compute)
    return {
        name: RawTensor(kinds[i], shape, partial(each, i))
        for i, (name, shape) in enumerate(shapes.items())
    }


def _one_at_a_time(compute: Callable[[], list[np.ndarray]]) -> Callable[[int], np.ndarray]:
    """Results that belong together, computed once and forgotten as they are handed out."""
    held: dict[int, np.ndarray] = {}

    def hand_out(i: int) -> np.ndarray:
        if i not in held:
            held.update(enumerate(compute()))
        return held.pop(i)

    return hand_out


def dequantised(source: Source, dtype: str | None = None) -> Source:
    """The source with whole matrices again, as near to those before as its bits allow.

    They are in `dtype`, or in what config.json says that the source was in.
    """
    how = source.config.get("quantization")
    if not isinstance(how, Mapping):
        raise UserError("the source is not quantized: there is nothing to undo")
    code = DTYPES.get(dtype or source.config.get("torch_dtype", "float32"), "F32")
    tensors = {}
    for name, tensor in source.tensors.items():
        prefix, _, part = name.rpartition(".")
        if f"{prefix}.scales" not in source.tensors:
            tensors[name] = tensor
        elif part == "weight":
            held = [source.tensors.get(f"{prefix}.{part}") for part in PARTS]
            tensors[name] = _whole(held, how, code)
    config = {k: v for k, v in source.config.items() if not k.startswith("quantization")}
    return replace(source, config=config, tensors=tensors)


def _whole(held: list[RawTensor | None], how: Mapping[str, Any], dtype: str) -> RawTensor:
    import mlx.core as mx

    from mlx_vlm_prune.models.arrays import to_array, to_bytes

    kinds = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}

    weight, scales = held[:2]
    assert weight and scales

    def compute() -> np.ndarray:
        with mx.stream(mx.cpu):
            # Scales in float32: a product rounded to sixteen bits twice would be another.
            arrays: list[Any] = [part and to_array(part) for part in held]
            floats = [part and part.dtype in kinds for part in held]
            pairs = zip(arrays, floats, strict=True)
            arrays = [each.astype(mx.float32) if wide else each for each, wide in pairs]
            made = to_bytes(mx.dequantize(*arrays, **how).astype(kinds[dtype]))
        for part in filter(None, held):
            part.forget()
        return made

    shape = (weight.shape[0], scales.shape[1] * how["group_size"])
    return RawTensor(dtype, shape, compute)
