"""Scenes as a user's own training data, and what tests compare after a run."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mlx_vlm_prune.models.loading import load_folder
from mlx_vlm_prune.models.vlm import VLM
from mlx_vlm_prune.scenes import compose
from mlx_vlm_prune.training.config import TrainConfig

QUESTION = "What does the sign say?"


def write(folder: Path, count: int = 8) -> Path:
    """FOLDER/train.jsonl, its pictures beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(count):
        picture: Image.Image = compose(i).image()
        picture.save(folder / f"{i}.png")
        line = {"image": f"{i}.png", "question": QUESTION, "answer": ["grey", "red"][i % 2]}
        lines.append(json.dumps(line))
    (folder / "train.jsonl").write_text("\n".join(lines))
    return folder / "train.jsonl"


def config(stage: str, model: Path | None, data: Path, out: Path, **keys: Any) -> TrainConfig:
    """A run of few steps into OUT."""
    values = {
        "stage": stage, "data": str(data), "model": model and str(model), "iters": 3,
        "batch_size": 2, "learning_rate": 1e-2, "save_every": 2, "adapter_path": str(out),
        "output": str(out), "max_seq_length": 512, **keys,
    }  # fmt: skip
    return TrainConfig.of(values, "the test")


def bits(model: VLM) -> dict[str, tuple[str, bytes]]:
    """Every tensor of a model, its dtype and bytes."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    tensors: Any = tree_flatten(model.parameters())
    return {name: (str(x.dtype), bytes(np.array(x.view(mx.uint8)))) for name, x in tensors}


def loaded(folder: Path | None) -> VLM:
    """The model in a folder; the built-in one without."""
    from mlx_vlm_prune.models.loading import find_folder

    return load_folder(find_folder(folder), "x" if folder else "scenes", "float32")[0]
