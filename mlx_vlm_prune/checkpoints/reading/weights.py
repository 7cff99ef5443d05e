"""The tensors of a weight file or of a folder, in any format and number of files."""

from collections.abc import Mapping
from pathlib import Path

from ..errors import UserError
from .files import open_safetensors, read_json
from .pth import read_pth
from .tensors import RawTensor

WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def read_weights(path: Path) -> dict[str, RawTensor]:
    """The tensors of a weight file, or of the one in a folder; shards are put together."""
    if path.is_dir():
        return _read_folder(path)
    if not path.exists():
        raise UserError(f"there is no {path}")
    return open_safetensors(path) if path.suffix == ".safetensors" else read_pth(path)


def _read_folder(folder: Path) -> dict[str, RawTensor]:
    for name in WEIGHTS:
        index = folder / (f"{name}.index.json")
        if index.is_file():
            return _read_shards(index)
        if (folder / name).is_file():
            return read_weights(folder / name)
    pths = sorted(folder.glob("*.pth"))
    if len(pths) == 1:
        return read_pth(pths[0])
    several = f"{len(pths)} .pth files: name one of them" if pths else "no .pth"
    raise UserError(f"{folder} is no checkpoint: it holds no {' or '.join(WEIGHTS)}, and {several}")


def _read_shards(index: Path) -> dict[str, RawTensor]:
    parts = read_json(index).get("weight_map")
    if not isinstance(parts, Mapping) or not all(isinstance(p, str) for p in parts.values()):
        raise UserError(f"{index} has no weight_map of file names")
    tensors: dict[str, RawTensor] = {}
    for part in sorted(set(parts.values())):
        if Path(part).name != part or "\\" in part or ":" in part:
            raise UserError(f"{index} names {part!r}, which is outside its folder")
        tensors |= read_weights(index.parent / part)
    if missing := sorted(set(parts) - set(tensors)):
        raise UserError(f"{index} promises {missing[0]}, which no shard holds")
    return tensors
