"""What written folders have in common: a config.json, tensors, and files that are copied."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_vlm_prune.checkpoints.config import CONFIG, NAFLEX_TYPE, is_clip
from mlx_vlm_prune.checkpoints.processor import PREPROCESSOR_CONFIG
from mlx_vlm_prune.checkpoints.reading.files import write_safetensors
from mlx_vlm_prune.checkpoints.reading.tensors import RawTensor
from mlx_vlm_prune.checkpoints.tower import is_tower
from mlx_vlm_prune.checkpoints.writing import copy_files


def fill_folder(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, RawTensor],
    copied: Sequence[str],
    source: Path,
) -> None:
    """Write config.json and tensors byte for byte as transformers does, and copy files."""
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")
    write_safetensors(folder / "model.safetensors", tensors, "pt")
    copy_files(copied, source, folder)


def fill_tower_folder(
    folder: Path, config: Mapping[str, Any], state: Mapping[str, RawTensor], source: Path
) -> None:
    """Write the tower of a published state dict; `config` is our config.json."""
    tower = {name: tensor for name, tensor in state.items() if is_tower(name)}
    fill_folder(
        folder, _tower_config(config["vision_config"]), tower, [PREPROCESSOR_CONFIG], source
    )


def _tower_config(vision: Mapping[str, Any]) -> dict[str, Any]:
    """As Hugging Face writes it; SigLIP's pooling head is left out, as in MiniMind-V."""
    if is_clip(vision):
        return {name: value for name, value in vision.items() if name != "feature_layers"}
    config = {**vision, "vision_use_head": False}
    if vision["model_type"] == NAFLEX_TYPE:
        config["num_patches"] = (config.pop("image_size") // vision["patch_size"]) ** 2
    return config
