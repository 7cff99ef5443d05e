"""Weights of learned methods beside a model: FOLDER/pruners.safetensors, as the product names them.

Tensors are named METHOD.parameter.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from mlx_vlm_prune.checkpoints.checkpoint import LEARNED_FILE
from mlx_vlm_prune.checkpoints.config import MiniMindConfig
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.checkpoints.reading.files import open_safetensors
from mlx_vlm_prune.checkpoints.reading.tensors import RawTensor
from mlx_vlm_prune.checkpoints.reading.weights import check_learned
from mlx_vlm_prune.checkpoints.user_module import unknown_weights

from ..pruners import METHODS, is_learned
from .language.twig import Twig
from .loading import to_tensor
from .names import from_tensor
from .vlm import VLM

logger = logging.getLogger("mlx_vlm_prune")
OURS = "pool_"  # what the published names of a pool's weights begin with, and the product's do not


def read_learned(folder: Path, model: VLM) -> dict[str, nn.Module]:
    """Modules by the names of their methods, in float32; none without the file.

    Weights of methods that are not in the table are left out. Raises UserError for a tensor of a
    method that has none, or that does not fit.
    """
    file = folder / LEARNED_FILE
    if file.exists():
        check_learned(file)
    states: dict[str, dict[str, torch.Tensor]] = {}
    unknown = set[str]()
    for key, raw in (open_safetensors(file) if file.exists() else {}).items():
        name, _, parameter = key.partition(".")
        if name not in METHODS:
            unknown.add(name)
            continue
        if not is_learned(name):
            raise UserError(f"{file}: tensor {key} belongs to no learned method")
        pooled = name == "attention_pool"
        states.setdefault(name, {})[OURS * pooled + parameter] = to_tensor(raw).float()
    if unknown:
        logger.info("%s: %s", file, unknown_weights(sorted(unknown)))
    return {name: _module(name, state, model, file) for name, state in states.items()}


def _module(
    name: str, state: Mapping[str, torch.Tensor], model: VLM, file: Path
) -> nn.Module:  # fmt: skip
    try:
        module: nn.Module
        if name == "twig":
            text = model.config.text
            assert isinstance(text, MiniMindConfig), "it grows on a language model of ours only"
            layers = len({key.split(".")[1] for key in state if key.startswith("layers.")})
            module = Twig(text, layers, int(state["layer"]))
        else:
            tokens = len(state.get(f"{OURS}queries", [0]))
            module = METHODS[name].make_weights(model.feature_dims, tokens)
        module.load_state_dict(dict(state))
    except (RuntimeError, KeyError, AssertionError) as e:
        raise UserError(f"{file}: {name} does not fit ({' '.join(str(e).split())})") from None
    return module.eval().to(model.device)


def parameter_name(key: str) -> str:
    """A parameter of a method's module, as the product names it."""
    return key.removeprefix(OURS)


def learned_tensors(name: str, module: nn.Module) -> dict[str, RawTensor]:
    """A method's weights as the file has them, in their own dtype."""
    return {
        f"{name}.{parameter_name(key)}": from_tensor(value)
        for key, value in module.state_dict().items()
    }
