"""Adapters fused into the matrices that they adapt; all other tensors keep their bits.

A quantized matrix is dequantized, changed, and quantized again in the same form. That rounds: how
much, beside what the adapter changes, is measured.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

from ..checkpoints.checkpoint import DTYPES, Checkpoint
from ..checkpoints.quantization import packing
from ..checkpoints.reading.tensors import RawTensor
from .adapters import adapted, adapters
from .arrays import FLOATS, to_raw
from .dequantized import PARTS, dequantised
from .language.experts import unstacked
from .vlm import VLM


@dataclass
class Fusion:
    """What became of the adapters. `change` and `rounding` are sums of squares over all requantized
    matrices: of what the adapters change, and of what quantizing again adds."""

    matrices: int = 0
    requantized: int = 0
    unchanged: int = 0  # requantized ones that came out as they were
    change: float = 0.0
    rounding: float = 0.0

    @property
    def rounded_share(self) -> float:
        """The rounding, relative to the change."""
        return float((self.rounding / self.change) ** 0.5) if self.change else 0.0


def fuse(
    checkpoint: Checkpoint, model: VLM, learned: Iterable[str], dequantize: bool = False
) -> tuple[Checkpoint, Fusion]:
    """The checkpoint with the adapters of a model that was loaded from it in float32, and with the
    projector's tensors in `learned`.

    `dequantize` leaves full matrices in place of all quantized ones.
    """
    fusion, settings = Fusion(), packing(checkpoint.config.get("quantization") or {})
    if settings and dequantize:
        checkpoint = dequantised(checkpoint)
    parameters: Any = dict(tree_flatten(model.parameters()))
    arrays = {name: parameters[name] for name in learned if name.startswith("projector.")}
    tensors = checkpoint.tensors | {n: _stored(x, checkpoint, n) for n, x in arrays.items()}
    with mx.stream(mx.cpu):
        for name, module in adapters(model):
            parts = {"weight": module.fuse(dequantize=True).weight}
            fusion.matrices += 1
            base = adapted(module)
            if "scales" in base and not dequantize:
                dtype = _float_dtype(checkpoint, name)
                parts = requantized(parts["weight"], base, dtype, settings, fusion)
            named = unstacked({f"{name}.{part}": array for part, array in parts.items()})
            tensors |= {key: _stored(array, checkpoint, key) for key, array in named.items()}
    return replace(checkpoint, tensors=tensors), fusion


def _stored(array: mx.array, checkpoint: Checkpoint, name: str) -> RawTensor:
    """The array as the tensor of that name is stored."""
    raw, dtype = to_raw(array), checkpoint.tensors[name].dtype
    return raw.astype(dtype) if raw.dtype in FLOATS else raw


def _float_dtype(checkpoint: Checkpoint, name: str) -> mx.Dtype:
    """What a quantized matrix was in before: as its scales, or as config.json says."""
    scales = checkpoint.tensors.get(f"{name}.scales")
    code = DTYPES.get(checkpoint.config.get("torch_dtype", "float32"), "F32")
    return FLOATS[scales.dtype if scales and scales.dtype in FLOATS else code]


def requantized(
    full: mx.array, base: nn.Module, dtype: mx.Dtype, settings: Mapping[str, Any], fusion: Fusion
) -> dict[str, mx.array]:
    """The parts of a full matrix in the form of the quantized one that it replaces; counted."""
    packed = mx.quantize(full.astype(dtype), **settings)
    before = _full([base[part] for part in PARTS if base.get(part) is not None], settings)
    after = _full(packed, settings)
    fusion.requantized += 1
    fusion.unchanged += bool(mx.array_equal(before, after))
    fusion.change += float(mx.square(full - before).sum())
    fusion.rounding += float(mx.square(after - full).sum())
    return dict(zip(PARTS, packed, strict=False))


def _full(parts: Sequence[mx.array], settings: Mapping[str, Any]) -> mx.array:
    """The matrix of packed words, scales and, in some modes, biases, in float32."""
    floats = FLOATS.values()
    each: list[Any] = [part.astype(mx.float32) if part.dtype in floats else part for part in parts]
    return mx.dequantize(*each, **settings)
