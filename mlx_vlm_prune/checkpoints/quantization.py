"""A quantized model: which matrices MLX packs, and the tensors that take their place."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import UserError, quoted
from .layer_shapes import Shapes
from .reading.fields import Fields

# Bits and group sizes of each mode of quantization, the default first.
MODES = {
    "affine": ((4, 2, 3, 5, 6, 8), (64, 32, 128)),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
}
BITS, GROUPS = (sorted({n for mode in MODES.values() for n in mode[i]}) for i in (0, 1))


PARTS = ("weight", "scales", "biases")  # of a packed matrix, beside its `bias`


@dataclass(frozen=True)
class Quantization:
    """The fields of `quantization`; with `tower` the tower's layers are packed like the language
    model's."""

    bits: int
    group_size: int
    mode: str = "affine"
    tower: bool = False


def parse_quantization(config: Fields) -> Quantization | None:
    """The quantization of a config.json, if any; UserError for what MLX cannot pack."""
    if config.get("quantization") is None:
        return None
    part = config.part("quantization")
    mode, bits, group = part.values.get("mode", "affine"), part.get("bits"), part.get("group_size")
    allowed = MODES[mode] if isinstance(mode, str) and mode in MODES else ((), ())
    fits = all(
        type(n) is int and n in choices for n, choices in zip((bits, group), allowed, strict=True)
    )
    if not fits or set(part.values) - {"bits", "group_size", "mode", "tower"}:
        raise UserError(
            f"{config.file}: quantization is {quoted(dict(part.values))}, which no mode of"
            f" {', '.join(MODES)} has"
        )
    return Quantization(bits, group, mode, part.flag("tower", False))


def packing(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that MLX's own functions take."""
    return {name: value for name, value in settings.items() if name != "tower"}


def packed(shapes: Shapes, quantization: Quantization) -> Shapes:
    """The shapes after quantization: bits packed into words of 32, scales, and biases.

    Raises UserError for a matrix that MLX cannot pack.
    """
    mode, bits, group_size = quantization.mode, quantization.bits, quantization.group_size
    parts_of_model = ("language.", "tower.encoder.layers.")[: 1 + quantization.tower]
    parts = ("scales", "biases") if mode == "affine" else ("scales",)
    packed_shapes: Shapes = {}
    for name, shape in shapes.items():
        packed_shapes[name] = shape
        if name.startswith(parts_of_model) and _is_quantisable(name, shape, group_size):
            rows, columns = shape
            if mode == "nvfp4" and rows * columns % 32:  # it takes 32, in a row or across
                raise UserError(
                    f"{name} is {rows} x {columns}: nvfp4 needs an even number of rows, or rows"
                    " that 32 divides; take another mode"
                )
            packed_shapes[name] = (rows, columns * bits // 32)
            prefix = name.removesuffix("weight")
            packed_shapes |= {prefix + part: (rows, columns // group_size) for part in parts}
    return packed_shapes


def _is_quantisable(name: str, shape: tuple[int, ...], group_size: int) -> bool:
    """Is this a matrix of whole groups? A router of experts is not quantized."""
    matrix = name.endswith(".weight") and len(shape) == 2
    return matrix and not name.endswith(".mlp.gate.weight") and shape[1] % group_size == 0
