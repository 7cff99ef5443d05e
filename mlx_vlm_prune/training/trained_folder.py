"""A trained model as a folder of ours, whichever framework trained it."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..checkpoints.checkpoint import LEARNED_FILE, Checkpoint
from ..checkpoints.config import ATTENTION_POOL, CONFIG
from ..checkpoints.errors import UserError
from ..checkpoints.families import is_llava, published_layout
from ..checkpoints.names.rules import to_published
from ..checkpoints.reading.tensors import RawTensor
from ..checkpoints.writing import write_folder
from .config import TrainConfig

STAGING = ".model"  # the folder in which a model is put together
TWIG = "twig"  # layers of a language model, which a stage of its own trains
Tensors = Mapping[str, RawTensor]


def write_trained(checkpoint: Checkpoint, config: TrainConfig, folder: Path) -> None:
    """Write a model to FOLDER, beside what a run has there.

    The model appears whole or not at all: without config.json a folder is no model, and that comes
    last. Raises UserError where it cannot be written; what was there then stays.
    """
    dtype = None if config.dtype == "auto" else config.dtype
    staging, ready = folder / STAGING, folder / STAGING / folder.absolute().name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        write_folder(checkpoint, ready, dtype, config.model)
        names = sorted({path.name for path in ready.iterdir()} - {CONFIG})
        for name in {CONFIG, LEARNED_FILE} - set(names):
            (folder / name).unlink(missing_ok=True)
        for name in [*names, CONFIG]:
            (ready / name).replace(folder / name)
    except OSError as e:
        raise UserError(f"cannot write a model to {folder}: {e.strerror or e}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def with_trained(
    start: Checkpoint, moved: Tensors, learned: Mapping[str, Tensors], pool: int | None = None
) -> Checkpoint:
    """The checkpoint that a run began with, and what learned in place of what it was.

    `moved` are tensors of the model, `learned` those of pruners beside it, by method and parameter;
    `pool` is the K of an `attention_pool` inside, which lies beside where the model as published
    has no place for one. What learned has the dtype that it has in `start`; what is not there, the
    language model's, and a small network beside the model float32.
    """
    norms = (n for n in start.tensors if n.startswith("language.") and n.endswith("norm.weight"))
    stored = start.tensors[next(norms)].dtype  # of the language model, quantized or not
    tensors, config = dict(start.tensors), dict(start.config)
    beside = {name: dict(weights) for name, weights in learned.items()}
    for name, tensor in moved.items():
        method, _, parameter = name.partition(".")
        if method == "pruner" and not _has_pool(config):
            beside.setdefault(ATTENTION_POOL, {})[parameter] = tensor
            continue
        tensors[name] = tensor.astype(tensors[name].dtype if name in tensors else stored)
    if pool is not None and _has_pool(config):
        config["pruner"] = {"name": ATTENTION_POOL, "tokens": pool}
    return replace(start, config=config, tensors=tensors, learned=_named(beside, stored))


def _named(learned: Mapping[str, Tensors], stored: str) -> dict[str, RawTensor]:
    """Tensors as METHOD.parameter; a twig's layers in the language model's dtype."""
    return {
        f"{method}.{name}": tensor.astype(stored if method == TWIG and name != "layer" else "F32")
        for method, weights in learned.items()
        for name, tensor in weights.items()
    }


def _has_pool(config: Mapping[str, Any]) -> bool:
    """Has a model published like this a place for `attention_pool` inside?"""
    if config.get("pruner"):
        return True
    if is_llava(config):
        return False
    table = published_layout(config, Path(CONFIG)).table
    return to_published(table, "pruner.queries") is not None
