"""`to-torch`: write the model in a folder of ours in its published layout."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mlx_vlm_prune.checkpoints.config import CONFIG, VLMConfig
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.checkpoints.families import is_llava, published_layout, read_ours
from mlx_vlm_prune.checkpoints.llava.published import published_config, published_tensors
from mlx_vlm_prune.checkpoints.minimind.published import usual_keys
from mlx_vlm_prune.checkpoints.names.renaming import to_published_layout
from mlx_vlm_prune.checkpoints.processor import CARRIED_FILES, PREPROCESSOR_CONFIG, TOKENIZER_FILES
from mlx_vlm_prune.checkpoints.reading.files import atomic_path
from mlx_vlm_prune.checkpoints.reading.pth import write_pth
from mlx_vlm_prune.checkpoints.reading.tensors import RawTensor
from mlx_vlm_prune.checkpoints.tower import is_tower

from .folders import fill_folder, fill_tower_folder

Tensors = Mapping[str, RawTensor]


def to_torch(source: Path, target: Path, vision: Path | None = None) -> None:
    """Write a MiniMind-V as a .pth, a LLaVA as a folder; a tower that lay apart into `vision`.

    Each appears complete or not at all.
    """
    config, sizes, tensors = read_ours(source)
    if is_llava(config):
        llava_to_torch(source, target, vision, config, tensors)
    else:
        _minimind_to_torch(source, target, vision, config, sizes, tensors)


def _minimind_to_torch(
    source: Path,
    target: Path,
    vision: Path | None,
    config: Mapping[str, Any],
    sizes: VLMConfig,
    tensors: Tensors,
) -> None:
    """Write a .pth, its keys in the order in which they came, or else in the authors' order."""
    generation = published_layout(config, source)
    published = to_published_layout(tensors, generation.table, sizes.text.head_dim, source)
    head, embedding = generation.tied
    state = {
        key: published[embedding if key == head else key]
        for key in _keys(usual_keys(published, generation), head, config, source)
    }
    with ExitStack() as stack:
        file = stack.enter_context(atomic_path(target))
        if vision:
            folder = stack.enter_context(atomic_path(vision, folder=True))
            fill_tower_folder(folder, config, published, source)
        write_pth(file, state)


def _keys(usual: list[str], head: str, config: Mapping[str, Any], source: Path) -> list[str]:
    """The keys as they came, and behind them what was added since; else the usual ones.

    Raises UserError where config.json holds no names.
    """
    keys = config.get("published_keys")
    if keys is None:
        return usual
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise UserError(f"{source / CONFIG}: published_keys is not a list of names")
    came = [key for key in dict.fromkeys(keys) if key in usual]
    return [*came, *(key for key in usual if key not in came and key != head)]


def llava_to_torch(
    source: Path,
    target: Path,
    vision: Path | None,
    config: Mapping[str, Any],
    tensors: Tensors,
) -> None:
    """Write a folder; with `vision`, the tower into a folder of its own."""
    original_config = published_config(config, source)
    state = published_tensors(tensors, published_layout(config, source), config, source)
    is_inside = not any(is_tower(name) for name in state)
    if is_inside and vision:
        raise UserError(f"{source} was published with its tower inside; leave out vision=FOLDER")
    rest = {name: tensor for name, tensor in state.items() if not is_tower(name)}
    with ExitStack() as stack:
        folder = stack.enter_context(atomic_path(target, folder=True))
        if vision:
            tower_folder = stack.enter_context(atomic_path(vision, folder=True))
            fill_tower_folder(tower_folder, config, state, source)
        copied = [*TOKENIZER_FILES, *CARRIED_FILES, *([PREPROCESSOR_CONFIG] if is_inside else [])]
        fill_folder(folder, original_config, rest, copied, source)
