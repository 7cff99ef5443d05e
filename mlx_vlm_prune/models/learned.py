"""The weights of learned methods that lie beside a model, in FOLDER/pruners.safetensors.

Tensors are named METHOD.parameter. They were trained for the model that they lie beside.
"""

from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..checkpoints.checkpoint import LEARNED_FILE
from ..checkpoints.config import MiniMindConfig
from ..checkpoints.errors import UserError
from ..pruners import METHODS
from .arrays import read_arrays
from .language.experts import stacked
from .language.twig import Twig
from .vlm import VLM

Weights = dict[str, mx.array]


def read_learned(folder: Path, model: VLM) -> dict[str, Any]:
    """Modules by the names of their methods, of the model's sizes; none without the file.

    Raises UserError for a file that is not sound, an unknown method, or a tensor that is
    missing, superfluous or misshapen.
    """
    file = folder / LEARNED_FILE
    if not file.exists():
        return {}
    found: dict[str, Weights] = {}
    for key, array in read_arrays(file).items():
        name, _, parameter = key.partition(".")
        if name not in METHODS or not METHODS[name].learned:
            raise UserError(f"{file}: tensor {key} belongs to no learned method")
        found.setdefault(name, {})[parameter] = array
    return {name: _module(file, name, weights, model) for name, weights in found.items()}


def _module(file: Path, name: str, weights: Weights, model: VLM) -> Any:
    queries, dtype = weights.get("queries"), mx.float32
    if name == "twig":  # it reads the model's hidden states, as the model's own layers do
        module, weights, dtype = _twig(file, weights, model), _joined(file, weights), model.dtype
    else:
        tokens = 1 if queries is None or not queries.size else len(queries)
        module = METHODS[name].make_weights(model.feature_dims, tokens)
    own: Any = tree_flatten(module.parameters())
    wanted = {key: array.shape for key, array in own}
    for key in wanted | weights:
        shape = weights[key].shape if key in weights else None
        if shape != wanted.get(key):
            raise UserError(f"{file}: {name}.{key} is {shape}, not {wanted.get(key)}")
    module.load_weights([(key, array.astype(dtype)) for key, array in weights.items()])
    module.eval()
    return module


def _joined(file: Path, weights: Weights) -> Weights:
    """A twig's parameters, the experts' matrices as one array."""
    try:
        return stacked({key: array for key, array in weights.items() if key != "layer"})
    except ValueError as e:
        raise UserError(f"{file}: the twig's experts are not of one kind ({e})") from None


def _twig(file: Path, weights: Weights, model: VLM) -> Twig:
    """Untrained, of as many layers as the file has, on the layer of the base that it names."""
    text, layer = model.config.text, weights.get("layer")
    if not isinstance(text, MiniMindConfig):
        raise UserError(f"{file}: a twig does not grow on a language model of mlx-lm's")
    depth, told = text.num_hidden_layers, None
    if layer is not None and layer.shape == (1,):
        told = layer.item()
    places = [number for number in range(1, depth) if number == told]
    if not places:
        raise UserError(f"{file}: twig.layer is {told}, not a whole number from 1 to {depth - 1}")
    layers = len({key.split(".")[1] for key in weights if key.startswith("layers.")})
    if not 1 <= layers <= depth:
        raise UserError(f"{file}: the twig has {layers} layers; this model allows 1 to {depth}")
    return Twig(text, layers, places[0])
