"""A language model in few bits, as MLX packs it: which matrices, and what takes their place."""

from dataclasses import dataclass

from .backbones import Shapes
from .errors import UserError
from .reading.fields import Fields

# Bits and group sizes of each mode of quantization, the default first.
MODES = {
    "affine": ((4, 2, 3, 5, 6, 8), (64, 32, 128)),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
}
BITS, GROUPS = (sorted({n for mode in MODES.values() for n in mode[i]}) for i in (0, 1))


@dataclass(frozen=True)
class Quantization:
    """The fields of `quantization`."""

    bits: int
    group_size: int
    mode: str = "affine"


def parse_quantization(config: Fields) -> Quantization | None:
    """That of a config.json, if it has one; UserError for what MLX cannot pack."""
    how = config.get("quantization")
    if how is None:
        return None
    part = config.part("quantization")
    mode, bits, group = part.values.get("mode", "affine"), part.get("bits"), part.get("group_size")
    able = MODES[mode] if isinstance(mode, str) and mode in MODES else ((), ())
    fits = all(type(n) is int and n in some for n, some in zip((bits, group), able, strict=True))
    if not fits or set(how) - {"bits", "group_size", "mode"}:
        raise UserError(
            f"{config.file}: quantization is {dict(how)!r}, which no mode of {', '.join(MODES)} has"
        )
    return Quantization(bits, group, mode)


def packed(shapes: Shapes, how: Quantization) -> Shapes:
    """The same of a quantized checkpoint: bits packed into words of 32, scales, and biases.

    Raises UserError for a matrix that MLX cannot pack.
    """
    parts = ("scales", "biases") if how.mode == "affine" else ("scales",)
    both: Shapes = {}
    for name, shape in shapes.items():
        both[name] = shape
        if _is_quantisable(name, shape, how.group_size):
            rows, columns = shape
            if how.mode == "nvfp4" and rows * columns % 32:  # it takes 32, in a row or across
                raise UserError(
                    f"{name} is {rows} x {columns}: nvfp4 needs an even number of rows, or rows"
                    " that 32 divides; take another mode"
                )
            both[name] = (rows, columns * how.bits // 32)
            prefix = name.removesuffix("weight")
            both |= {prefix + part: (rows, columns // how.group_size) for part in parts}
    return both


def _is_quantisable(name: str, shape: tuple[int, ...], group_size: int) -> bool:
    """Is this a matrix of the language model? A router stays."""
    matrix = name.startswith("language.") and name.endswith(".weight") and len(shape) == 2
    return matrix and not name.endswith(".mlp.gate.weight") and shape[1] % group_size == 0
