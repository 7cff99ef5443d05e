"""Load a model of ours and its processor from a folder.

A checkpoint comes from strangers: its sizes are bounded, its tensors checked against
them by name and shape, and nothing in it is executed.
"""

from collections.abc import Mapping
from dataclasses import asdict, replace
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import mlx.core as mx
from mlx import nn

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.config import CONFIG, VLMConfig, parse_config
from ..checkpoints.dual_encoder import read_dual_encoder
from ..checkpoints.errors import UserError
from ..checkpoints.families import is_ours, read_checkpoint
from ..checkpoints.hub import resolve_path
from ..checkpoints.processor import preprocessor_folder
from ..checkpoints.quantization import packing
from ..checkpoints.reading.files import open_safetensors, read_json
from ..checkpoints.reading.weights import read_folder
from ..checkpoints.shapes import check_complete
from ..inputs.captions import EncoderProcessor
from ..inputs.processor import Processor, read_preprocessor, read_processor
from ..machine.hardware import on_cpu
from ..scenes import CHECKPOINT
from .arrays import DTYPES as CODES
from .arrays import to_array
from .dual_encoder import DualEncoder
from .language.experts import stacked
from .learned import read_learned
from .memory import check_fits
from .vlm import VLM

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
FLOATS = tuple(DTYPES.values())


def load_folder(folder: Path, name: str, dtype: str = "auto") -> tuple[VLM, Processor]:
    """The model in a folder of ours or of a published MiniMind-V or LLaVA, and its processor.

    `name` is what the user called it. Raises UserError for whatever cannot be loaded.
    """
    return _build(*_read(folder, dtype), folder, name)


def load_checkpoint(
    checkpoint: Checkpoint, folder: Path, name: str, dtype: str = "auto"
) -> tuple[VLM, Processor]:
    """The same of a checkpoint that was read already; `folder` is where it lies."""
    return _build(*_brought_over(checkpoint, folder, dtype), folder, name)


def _build(
    config: VLMConfig, weights: dict[str, mx.array], checkpoint: Checkpoint, folder: Path, name: str
) -> tuple[VLM, Processor]:
    model, weights = VLM(config), stacked(weights)
    if quantization := config.quantization:
        quantized = {name.removesuffix(".scales") for name in weights if ".scales" in name}
        settings = packing(asdict(quantization))
        nn.quantize(model, **settings, class_predicate=lambda path, _: path in quantized)
    model.load_weights(list(weights.items()))
    beside = read_learned(folder, model)
    model.learned = MappingProxyType({**model.learned, **beside})
    model.eval()
    # All arrays, not the parameters alone: what is left lazy belongs to this thread, and a server
    # answers in another.
    mx.eval(model)
    return model, read_processor(checkpoint, config, name, folder)


def weights_dtype(dtype: str) -> mx.Dtype | None:
    """What weights become; None is the checkpoint's own. UserError for an unknown name."""
    if dtype not in ("auto", *DTYPES):
        raise UserError(f"no dtype is called {dtype!r}; there are auto, {', '.join(DTYPES)}")
    return DTYPES[dtype] if dtype != "auto" else mx.float32 if on_cpu() else None


def _read(folder: Path, dtype: str) -> tuple[VLMConfig, dict[str, mx.array], Checkpoint]:
    """One of our folders, or one as published, brought over: checked, its weights in what they are
    to be in, and the rest of it."""
    if not is_ours(folder):
        return _brought_over(read_checkpoint(folder), folder, dtype)
    whole = read_json(folder / CONFIG)
    tensors = read_folder(folder, open_safetensors)
    check_complete(tensors, parse_config(whole, folder / CONFIG), folder)
    return _brought_over(Checkpoint(whole, tensors, folder, folder), folder, dtype)


def _brought_over(
    checkpoint: Checkpoint, folder: Path, dtype: str
) -> tuple[VLMConfig, dict[str, mx.array], Checkpoint]:
    config, tensors = parse_config(checkpoint.config, folder / CONFIG), checkpoint.tensors.items()
    target = _check_size({k: (t.shape, CODES.get(t.dtype)) for k, t in tensors}, dtype, folder)
    weights = {}
    for name, tensor in tensors:
        weights[name] = _convert(to_array(tensor), target)
        tensor.forget()
    return config, weights, replace(checkpoint, tensors={})


def _convert(array: mx.array, target: mx.Dtype) -> mx.array:
    """In another type, evaluated at once: its source is freed before the next one is read."""
    converted = array.astype(target) if array.dtype in FLOATS else array
    mx.eval(converted)
    return converted


def _check_size(shapes: Mapping[str, tuple[Any, Any]], dtype: str, where: Path) -> mx.Dtype:
    """What the weights are to be in; UserError where they would not fit into memory.

    `shapes` are shape and type of each. What they are in now is not counted on top: tensors are
    read and changed one after another, and each old one is let go. Experts count twice, since
    they are put together while all are there.
    """
    norms = (n for n in shapes if n.startswith("language.") and n.endswith("norm.weight"))
    stored = shapes.get(next(norms, ""), ((), mx.float32))[1] or mx.float32
    target = weights_dtype(dtype) or stored
    needed = sum(
        prod(shape)
        * (target.size if kind in FLOATS else kind.size if kind else 0)
        * (2 if ".experts." in name else 1)
        for name, (shape, kind) in shapes.items()
    )
    check_fits(needed, str(where))
    return target


def find_folder(path_or_hub_name: str | Path | None, revision: str | None = None) -> Path:
    """Where a model's files lie on this disk; the built-in model's without a path. UserError."""
    path = CHECKPOINT if path_or_hub_name is None else resolve_path(path_or_hub_name, revision)
    if not path.is_dir():
        raise UserError(f"{path} is a file; a model is a folder (see mlx-vlm-prune convert to-mlx)")
    return path


def load_dual_encoder(
    folder: Path, name: str, dtype: str = "auto"
) -> tuple[DualEncoder, EncoderProcessor]:
    """The whole CLIP or SigLIP in a folder, and its processor. Raises UserError."""
    config, tensors = read_dual_encoder(folder)
    stored = CODES[tensors["tower.post_layernorm.weight"].dtype]
    target = weights_dtype(dtype) or stored
    check_fits(sum(prod(tensor.shape) * target.size for tensor in tensors.values()), str(folder))
    model = DualEncoder(config)
    model.load_weights([(k, _convert(to_array(tensor), target)) for k, tensor in tensors.items()])
    model.eval()
    image = read_preprocessor(preprocessor_folder(folder), config.vision)
    return model, EncoderProcessor(config, image, name, folder)
