"""The tensors of a weight file or of a folder, in any format and number of files."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..errors import UserError, clipped, quoted
from .files import open_safetensors, optional_json, read_json
from .paths import check_regular, find_files, is_here
from .pth import read_pth
from .tensors import FLOATS, PACKED, RawTensor

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
INDEX = f"{WEIGHTS[0]}.index.json"
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin", "adapters.safetensors")
ADAPTER_CONFIG = "adapter_config.json"

T = TypeVar("T")


def read_weights(path: Path) -> dict[str, RawTensor]:
    """The tensors of a weight file, or of those in a folder."""
    return read_folder(path, _read_file) if path.is_dir() else _read_file(path)


def check_learned(file: Path) -> None:
    """UserError for weights of learned methods or adapters that are no floats, or not finite."""
    for name, tensor in open_safetensors(file).items():
        if not name.endswith(".layer"):  # where a twig grows, a whole number
            check_finite(name, tensor, file)


def check_dtypes(tensors: Mapping[str, RawTensor], where: Path, kinds: Sequence[str] = ()) -> None:
    """UserError for weights that are neither floats nor packed, with scales beside them; with
    `kinds`, only those whose names end in one of these are looked at."""
    for name, tensor in tensors.items():
        prefix, _, kind = name.rpartition(".")
        allowed = (*FLOATS, *(PACKED if f"{prefix}.scales" in tensors else ()))
        if tensor.dtype not in allowed and kind in (kinds or (kind,)):
            raise UserError(
                f"{where}: tensor {clipped(name)} is {tensor.dtype}, not {', '.join(FLOATS)}"
            )


def check_finite(name: str, tensor: RawTensor, file: Path) -> None:
    """UserError for a tensor whose numbers are no floats, or not finite."""
    if tensor.dtype not in FLOATS:
        raise UserError(
            f"{file}: tensor {clipped(name)} is {tensor.dtype}, not {', '.join(FLOATS)}"
        )
    if not np.isfinite(tensor.floats()).all():
        raise UserError(f"{file}: tensor {clipped(name)} has numbers that are not finite")


def _read_file(path: Path) -> dict[str, RawTensor]:
    check_regular(path)
    return open_safetensors(path) if path.suffix == ".safetensors" else read_pth(path)


def read_folder(folder: Path, read_file: Callable[[Path], Mapping[str, T]]) -> dict[str, T]:
    """The tensors of a folder, each of its weight files read by `read_file`.

    Raises UserError for a name that occurs twice, and for one that an index promises in vain.
    """
    tensors: dict[str, T] = {}
    files, index = _select(folder)
    for file in files:
        part = read_file(file)
        if twice := sorted(tensors.keys() & part.keys()):
            raise UserError(
                f"{folder} holds the tensor {clipped(twice[0])} twice, in {file.name} too"
            )
        tensors |= part
    if index and (missing := sorted(_weight_map(index).keys() - tensors)):
        raise UserError(f"{index} promises {clipped(missing[0])}, which no shard holds")
    return tensors


def has_weights(folder: Path) -> bool:
    """Is there a weight file, or an index of some?"""
    names = (name + end for name in WEIGHTS for end in ("", ".index.json"))
    return any(is_here(folder / name) for name in names)


def weight_files(folder: Path) -> list[Path]:
    """The files that a folder's tensors are in, as transformers selects them: model.safetensors,
    else what its index names; else the same of pytorch_model.bin; else, MiniMind's, the only .pth.

    Raises UserError where there are none, or where it cannot be told which they are.
    """
    return _select(folder)[0]


def _select(folder: Path) -> tuple[list[Path], Path | None]:
    """The files, and their index, if there is one."""
    _check_adapter(folder)
    for name in WEIGHTS:
        file, index = folder / name, folder / f"{name}.index.json"
        if is_here(file):
            check_regular(file)
            return [file], None
        if is_here(index):
            shards = [folder / part for part in sorted(set(_weight_map(index).values()))]
            for shard in shards:
                check_regular(shard)
            return shards, index
    pths = find_files(folder, "*.pth")
    if len(pths) == 1:
        return pths, None
    raise UserError(_why_no_weights(folder, len(pths)))


def _weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor. Raises UserError for an index that names others than its own."""
    parts = read_json(index).get("weight_map")
    if not isinstance(parts, dict) or not all(isinstance(p, str) for p in parts.values()):
        raise UserError(f"{index} has no weight_map of file names")
    for part in sorted(set(parts.values())):
        if Path(part).name != part or "\\" in part or ":" in part:
            raise UserError(f"{index} names {quoted(part)}, which is outside its folder")
    return parts


def _check_adapter(folder: Path) -> None:
    """UserError for peft's adapter beside a whole model, which transformers would put into it."""
    if has_weights(folder) and "peft_type" in optional_json(folder / ADAPTER_CONFIG):
        raise UserError(
            f"{folder} holds an adapter of peft's ({ADAPTER_CONFIG}) beside the weights: merge it"
            " into them (merge_and_unload), or move it to a folder of its own"
        )


def _why_no_weights(folder: Path, pths: int) -> str:
    if shards := find_files(folder, "model-*-of-*.safetensors", "pytorch_model-*-of-*.bin"):
        name = WEIGHTS[shards[0].suffix == ".bin"]
        return (
            f"{folder} holds shards ({shards[0].name}, …) without {name}.index.json, which says"
            " what belongs together"
        )
    if any(is_here(folder / name) for name in ADAPTERS):
        base: Any = optional_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
        name = f" of {base[:80]}" if isinstance(base, str) and base.isprintable() and base else ""
        return (
            f"{folder} holds an adapter only; give the model that it was trained for{name}, and the"
            " adapter by adapter_path"
        )
    several = f"{pths} .pth files: name one of them" if pths else "no .pth"
    return f"{folder} is no checkpoint: it holds no {' or '.join(WEIGHTS)}, and {several}"
