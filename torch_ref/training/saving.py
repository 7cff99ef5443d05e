"""A trained model as a folder of ours, which MLX and the reference load alike."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from mlx_vlm_prune.checkpoints.checkpoint import DTYPES, LEARNED_FILE, Checkpoint
from mlx_vlm_prune.checkpoints.config import CONFIG
from mlx_vlm_prune.checkpoints.reading.files import open_safetensors, write_safetensors
from mlx_vlm_prune.checkpoints.reading.tensors import RawTensor
from mlx_vlm_prune.checkpoints.writing import write_folder
from mlx_vlm_prune.training.config import TrainConfig

PARTS = ".model"  # the folder in which a model is put together


def write_model(
    folder: Path,
    start: Checkpoint,
    moved: Mapping[str, RawTensor],
    learned: Mapping[str, RawTensor],
    config: TrainConfig,
) -> None:
    """Write the checkpoint that a run began with, with the tensors that `moved`, and the weights of
    pruners that were `learned` beside it (METHOD.parameter).

    A tensor that did not learn keeps its bytes; one that did has the dtype it had. The model
    appears whole or not at all: without config.json a folder is no model, and that comes last.
    """
    tensors = dict(start.tensors)
    for name, tensor in moved.items():
        tensors[name] = tensor.astype(tensors[name].dtype)
    folder.mkdir(parents=True, exist_ok=True)
    ready, dtype = folder / PARTS, None if config.dtype == "auto" else config.dtype
    shutil.rmtree(ready, ignore_errors=True)
    write_folder(replace(start, tensors=tensors), ready, dtype, config.model)
    if learned:
        before = open_safetensors(start.learned_file) if start.learned_file else {}
        methods = {name.partition(".")[0] for name in learned}
        others = {k: t for k, t in before.items() if k.partition(".")[0] not in methods}
        write_safetensors(ready / LEARNED_FILE, {**others, **learned}, "mlx")
    for path in sorted(ready.iterdir(), key=lambda path: path.name == CONFIG):
        path.replace(folder / path.name)
    ready.rmdir()


def in_dtype_of_model(name: str, start: Checkpoint) -> str:
    """Of a learned tensor: a twig's layers are in the language model's, all else in float32."""
    if name.startswith("twig.") and name != "twig.layer":
        return DTYPES[start.config["torch_dtype"]]
    return "F32"
