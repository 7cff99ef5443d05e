"""Adapters fused into the folder of a model of mlx-vlm's; all other tensors keep their bits.

mlx-vlm renames tensors as it reads them, so a stored matrix is known by the end of its name and by
its values. Files in which nothing changes are linked.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
from mlx import nn

from ..checkpoints.errors import UserError
from ..checkpoints.reading.files import (
    atomic_path,
    open_safetensors,
    read_header,
    write_safetensors,
)
from ..checkpoints.reading.tensors import RawTensor
from ..models.adapters import adapted, adapters
from ..models.arrays import FLOATS, to_array, to_raw
from ..models.fusing import Fusion, requantized
from .linked_folder import link_or_copy, mlx_vlm_weight_files
from .loading import load

Tensors = dict[str, RawTensor]


def fuse_into_folder(source: Path, adapter_path: str | Path, target: Path) -> Fusion:
    """Write `target`, which is `source` with adapters in its matrices. Quantized ones are quantized
    again, with the same bits.

    Raises UserError, and leaves nothing, where a matrix that has an adapter is not in `source`.
    """
    model, _ = load(source, dtype="float32", adapter_path=adapter_path)
    files = {file: open_safetensors(file) for file in mlx_vlm_weight_files(source)}
    stored = {name: tensor for tensors in files.values() for name, tensor in tensors.items()}
    fusion, changed = Fusion(), Tensors()
    with mx.stream(mx.cpu):
        for name, module in adapters(model):
            prefix = _stored_name(stored, name, adapted(module), source)
            changed |= _fused(stored, prefix, module, fusion)
    rewritten = {file: tensors for file, tensors in files.items() if tensors.keys() & changed}
    with atomic_path(target, folder=True) as folder:
        link_or_copy(source, folder, [file.name for file in rewritten])
        for file, tensors in rewritten.items():
            replaced = {name: changed.get(name, tensor) for name, tensor in tensors.items()}
            write_safetensors(folder / file.name, replaced, read_header(file)[1] or "mlx")
    return fusion


def _stored_name(stored: Mapping[str, RawTensor], name: str, base: nn.Module, source: Path) -> str:
    """What a module is called in the files. Raises UserError where it is not there once."""
    ends = re.findall(r"(?:layers|blocks)\.\d+\..+|[^.]+$", name)[0] + ".weight"
    names = [key for key in stored if f".{key}".endswith(f".{ends}") and _equal(stored[key], base)]
    if len(names) != 1:
        raise UserError(
            f"{source} holds {len(names)} tensors that mlx-vlm reads as {name}, so no adapter can"
            " be fused into it; convert the model by mlx_vlm.convert first"
        )
    return names[0].removesuffix(".weight")


def _equal(tensor: RawTensor, base: nn.Module) -> bool:
    """Is it the module's matrix?"""
    if tensor.shape != base.weight.shape or tensor.dtype not in (*FLOATS, "U32"):
        return False
    is_equal = mx.array_equal(to_array(tensor).astype(base.weight.dtype), base.weight)
    tensor.forget()
    return bool(is_equal)


def _fused(
    stored: Mapping[str, RawTensor], prefix: str, module: nn.Module, fusion: Fusion
) -> Tensors:
    """The tensors of a matrix with its adapter, as they are stored; counted."""
    base, parts = adapted(module), {"weight": module.fuse(dequantize=True).weight}
    fusion.matrices += 1
    if "scales" in base:
        settings = {"group_size": base.group_size, "bits": base.bits, "mode": base.mode}
        dtype = FLOATS.get(stored[f"{prefix}.scales"].dtype, mx.float32)
        parts = requantized(parts["weight"], base, dtype, settings, fusion)
    raw = {f"{prefix}.{part}": to_raw(array) for part, array in parts.items()}
    return {
        name: tensor.astype(stored[name].dtype) if tensor.dtype in FLOATS else tensor
        for name, tensor in raw.items()
    }
