"""The weights of learned methods that lie beside a model, in FOLDER/pruners.safetensors.

Tensors are named METHOD.parameter. They were trained for the model that they lie beside.
"""

import logging
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
from mlx.utils import tree_flatten

from ..checkpoints.checkpoint import LEARNED_FILE
from ..checkpoints.config import MiniMindConfig
from ..checkpoints.errors import UserError
from ..checkpoints.reading.weights import check_learned
from ..checkpoints.user_module import unknown_weights
from ..pruners import METHODS, register_installed
from .arrays import read_arrays
from .language.experts import stacked
from .language.twig import Twig
from .vlm import VLM

logger = logging.getLogger("mlx_vlm_prune")
Weights = dict[str, mx.array]


class Featured(Protocol):
    """A model whose tower gives features of so many dimensions."""

    @property
    def feature_dims(self) -> int | None: ...


def read_learned(folder: Path, model: Featured) -> dict[str, Any]:
    """Modules by the names of their methods, of the model's sizes; none without the file.

    Weights of a method that is not in the table are left out, and a note says so: its file may not
    have been named. Raises UserError for a file that is not sound, a method without weights, or a
    tensor that is missing, superfluous or misshapen.
    """
    file = folder / LEARNED_FILE
    if not file.exists():
        return {}
    check_learned(file)
    weights_of: dict[str, Weights] = {}
    arrays = read_arrays(file)
    names = {key.partition(".")[0] for key in arrays}
    register_installed(names)
    if unknown := sorted(names - METHODS.keys()):
        logger.info("%s: %s", file, unknown_weights(unknown))
    for key, array in arrays.items():
        name, _, parameter = key.partition(".")
        if name in unknown:
            continue
        if name not in METHODS or not METHODS[name].learned:
            raise UserError(f"{file}: tensor {key} belongs to no learned method")
        weights_of.setdefault(name, {})[parameter] = array
    return {name: _module(file, name, weights, model) for name, weights in weights_of.items()}


def _module(file: Path, name: str, weights: Weights, model: Featured) -> Any:
    queries, dtype = weights.get("queries"), mx.float32
    if name == "twig":  # it reads the model's hidden states, as the model's own layers do
        if not isinstance(model, VLM):
            raise UserError(f"{file}: a twig does not grow on a model of mlx-vlm's")
        module, weights, dtype = (
            _twig(file, weights, model),
            _stack_experts(file, weights),
            model.dtype,
        )
    else:
        tokens = 1 if queries is None or not queries.size else len(queries)
        module = METHODS[name].make_weights(model.feature_dims, tokens)
    parameters: Any = tree_flatten(module.parameters())
    shapes = {key: array.shape for key, array in parameters}
    for key in shapes | weights:
        shape = weights[key].shape if key in weights else None
        if shape != shapes.get(key):
            raise UserError(f"{file}: {name}.{key} is {shape}, not {shapes.get(key)}")
    module.load_weights([(key, array.astype(dtype)) for key, array in weights.items()])
    module.eval()
    mx.eval(module)
    return module


def _stack_experts(file: Path, weights: Weights) -> Weights:
    """A twig's parameters, with the experts' matrices as one array."""
    try:
        return stacked({key: array for key, array in weights.items() if key != "layer"})
    except ValueError as e:
        raise UserError(f"{file}: the twig's experts are not of one kind ({e})") from None


def _twig(file: Path, weights: Weights, model: VLM) -> Twig:
    """An untrained twig with the file's number of layers, on the base's layer that it names."""
    text, layer = model.config.text, weights.get("layer")
    if not isinstance(text, MiniMindConfig):
        raise UserError(f"{file}: a twig does not grow on a language model of mlx-lm's")
    depth, number = text.num_hidden_layers, None
    if layer is not None and layer.shape == (1,):
        number = layer.item()
    places = [i for i in range(1, depth) if i == number]
    if not places:
        raise UserError(f"{file}: twig.layer is {number}, not a whole number from 1 to {depth - 1}")
    layers = len({key.split(".")[1] for key in weights if key.startswith("layers.")})
    if not 1 <= layers <= depth:
        raise UserError(f"{file}: the twig has {layers} layers; this model allows 1 to {depth}")
    return Twig(text, layers, places[0])
