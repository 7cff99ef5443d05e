"""What a run leaves for a user to load: a folder of ours, as `convert to-mlx` writes it."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..checkpoints.checkpoint import LEARNED_FILE, Checkpoint
from ..checkpoints.config import ATTENTION_POOL, CONFIG
from ..checkpoints.families import is_llava, published_layout
from ..checkpoints.names.rules import to_published
from ..checkpoints.reading.tensors import RawTensor
from ..checkpoints.writing import write_folder
from ..models.arrays import to_raw
from ..models.language.experts import unstacked
from ..models.vlm import VLM
from .config import TrainConfig
from .pruner_weights import TWIG
from .start import read_start

PARTS = ".model"  # the folder in which a model is put together


def save_model(
    model: VLM, learned: Mapping[str, Mapping[str, mx.array]], config: TrainConfig, folder: Path
) -> None:
    """Write the model with the learned pruners' weights `learned` (by method and parameter) to
    FOLDER.

    A tensor that did not learn keeps its bytes. One that did is in the dtype which it has in the
    checkpoint that the run began with, whatever it was trained in; with `dtype` other than auto all
    are in that one. Weights that the checkpoint has not are in the language model's dtype, a small
    network's beside the model in float32.

    The model appears whole or not at all: without config.json a folder is no model, and that comes
    last. Raises UserError where it cannot be written; what was there then stays.
    """
    checkpoint = trained_checkpoint(read_start(config), model, learned)
    dtype = None if config.dtype == "auto" else config.dtype
    folder.mkdir(parents=True, exist_ok=True)
    parts, ready = folder / PARTS, folder / PARTS / folder.absolute().name
    shutil.rmtree(parts, ignore_errors=True)
    parts.mkdir()
    write_folder(checkpoint, ready, dtype, config.model)
    names = sorted({path.name for path in ready.iterdir()} - {CONFIG})
    for name in {CONFIG, LEARNED_FILE} - set(names):
        (folder / name).unlink(missing_ok=True)
    for name in [*names, CONFIG]:
        (ready / name).replace(folder / name)
    shutil.rmtree(parts)


def trained_checkpoint(
    start: Checkpoint, model: VLM, learned: Mapping[str, Mapping[str, mx.array]]
) -> Checkpoint:
    """The checkpoint that a run began with, and what learned in place of what it was."""
    norms = (n for n in start.tensors if n.startswith("language.") and n.endswith("norm.weight"))
    stored = start.tensors[next(norms)].dtype  # of the language model, quantized or not
    moved: Any = tree_flatten(model.trainable_parameters())
    tensors, config = dict(start.tensors), dict(start.config)
    beside = {name: dict(weights) for name, weights in learned.items()}
    for name, array in unstacked(dict(moved)).items():
        method, _, parameter = name.partition(".")
        if method == "pruner" and not _has_pool(config):
            beside.setdefault(ATTENTION_POOL, {})[parameter] = array
            continue
        dtype = tensors[name].dtype if name in tensors else stored
        tensors[name] = to_raw(array).astype(dtype)
    if model.config.pruner and _has_pool(config):
        name, tokens = model.config.pruner
        config["pruner"] = {"name": name, "tokens": tokens}
    return replace(start, config=config, tensors=tensors, learned=_named(beside, stored))


def _named(learned: Mapping[str, Mapping[str, mx.array]], stored: str) -> dict[str, RawTensor]:
    """Tensors as METHOD.parameter; a twig's layers in the language model's dtype."""
    return {
        f"{method}.{name}": to_raw(array).astype(
            stored if method == TWIG and name != "layer" else "F32"
        )
        for method, weights in learned.items()
        for name, array in weights.items()
    }


def _has_pool(config: Mapping[str, Any]) -> bool:
    """Has a model published like this a place for `attention_pool` inside?"""
    if config.get("pruner"):
        return True
    if is_llava(config):
        return False
    table = published_layout(config, Path(CONFIG)).table
    return to_published(table, "pruner.queries") is not None
