"""Runs of few steps on a tiny model, and what tests compare after them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_vlm_prune.inputs.prompt import Prompt
from mlx_vlm_prune.models.loading import find_folder, load_folder
from mlx_vlm_prune.models.vlm import VLM
from mlx_vlm_prune.pruners import plan
from mlx_vlm_prune.training.batches import Batch
from mlx_vlm_prune.training.config import TrainConfig

Bits = dict[str, tuple[str, bytes]]


def config(stage: str, data: Any, out: Any, **keys: Any) -> TrainConfig:
    """A run of few steps into OUT."""
    values = {
        "stage": stage, "data": str(data), "iters": 3, "batch_size": 2, "learning_rate": 1e-2,
        "save_every": 2, "adapter_path": str(out), "output": str(out), "max_seq_length": 512,
        **keys,
    }  # fmt: skip
    return TrainConfig.of(values, "the test")


def bits(model: Any) -> Bits:
    """Every tensor of a model, its dtype and bytes."""
    tensors: Any = tree_flatten(model.parameters())
    return {name: (str(x.dtype), bytes(np.array(x.view(mx.uint8)))) for name, x in tensors}


def loaded(folder: Path | None) -> VLM:
    """The model in a folder; the built-in one without."""
    return load_folder(find_folder(folder), "x" if folder else "scenes", "float32")[0]


def batch(prompts: list[Prompt], answers: int, side: int, seed: int = 0) -> Batch:
    """Prompts with random pictures, whose last words are the answers."""
    flags = []
    for prompt in prompts:
        is_answer = np.zeros(len(prompt.ids), bool)
        is_answer[-answers:] = True
        flags.append(is_answer)
    images = sum(len(prompt.runs) for prompt in prompts)
    random = np.random.default_rng(seed)
    pixels = random.normal(size=(images, side, side, 3)).astype(np.float32) if images else None
    return Batch(prompts, flags, pixels)


def logits(model: VLM, read: Batch) -> np.ndarray:
    """Of every row, without pruning."""
    pixels = None if read.pixels_IHW3 is None else mx.array(read.pixels_IHW3)
    return np.array(model(read.prompts, pixels, plan("none"), model.N, last_only=False).logits_BLV)


def without_images(prompt: Prompt) -> Prompt:
    """Its words alone."""
    inside = {i for start, length in prompt.runs for i in range(start, start + length)}
    return replace(prompt, ids=[x for i, x in enumerate(prompt.ids) if i not in inside], runs=[])
