"""The reference's names of tensors, and those of our checkpoint folders; each way.

The reference has the names, the order and the layout of what was published: a convolution's input
channels stand second here, and last in a folder of ours.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mlx_vlm_prune.checkpoints.config import CONFIG, MlxLmConfig, is_clip, parse_config
from mlx_vlm_prune.checkpoints.families import is_llava, published_layout
from mlx_vlm_prune.checkpoints.llava.layouts import REFERENCE, tower_table
from mlx_vlm_prune.checkpoints.minimind.tables import LLAMA
from mlx_vlm_prune.checkpoints.names.renaming import to_our_names, to_our_order, to_published_layout
from mlx_vlm_prune.checkpoints.names.rules import Table
from mlx_vlm_prune.checkpoints.reading import pth
from mlx_vlm_prune.checkpoints.reading.tensors import RawTensor

Config = Mapping[str, Any]  # our config.json


def to_reference(
    tensors: Mapping[str, RawTensor], config: Config, where: Path
) -> dict[str, RawTensor]:
    """Tensors of a folder of ours under the reference's names: a state dict's, but raw."""
    return to_published_layout(tensors, _table(config, where), _head_dim(config, where), where)


def to_ours(state: Mapping[str, Tensor], config: Config, where: Path) -> dict[str, RawTensor]:
    """Parameters of the reference, or as many numbers, as a folder of ours names them."""
    raw = {name: from_tensor(tensor) for name, tensor in state.items()}
    table = _table(config, where)
    named = to_our_names(raw, table, "the reference", where)
    return to_our_order(named, table, _head_dim(config, where))


def from_tensor(tensor: Tensor) -> RawTensor:
    """The same bytes, in the memory of the tensor where it lies on the CPU."""
    raw = pth.raw_tensor(tensor.detach().cpu())
    return RawTensor(raw.dtype, raw.shape, raw.data)


def _table(config: Config, where: Path) -> Table:
    vision = config["vision_config"]
    if is_llava(config):
        text = parse_config(config, where / CONFIG).text
        stock = isinstance(text, MlxLmConfig)
        layout = replace(REFERENCE, text="model.stock") if stock else REFERENCE
        return layout.table(is_clip(vision), config["text_config"])
    projector = published_layout(config, where).projector
    return LLAMA + projector + tower_table("vision_encoder.vision_model", is_clip(vision))


def _head_dim(config: Config, where: Path) -> int:
    """Of heads whose halves lie in another order in one release of MiniMind-V."""
    return 1 if is_llava(config) else parse_config(config, where / CONFIG).text.head_dim
