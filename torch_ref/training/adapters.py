"""Stages `lora` and `dora`: adapters in the language model learn; the model itself stays.

LoRA (arXiv:2106.09685) and DoRA (arXiv:2402.09353) by their formulas, in the files that mlx-lm
writes, so that `--adapter-path` reads them. peft's scaling, alpha / r, is `scale` here.

Shapes: D inputs of a matrix, O outputs, r rank.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mlx_vlm_prune.checkpoints.adapters import write_adapters
from mlx_vlm_prune.checkpoints.errors import UserError

from ..models.names import to_ours
from .learner import MODEL, Learner


class LoRALinear(nn.Module):
    """x W^T + scale x A B; B is zero at first."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float, dropout: float):
        super().__init__()
        self.linear, self.scale, self.dropout = linear, scale, nn.Dropout(dropout)
        outputs, inputs = linear.weight.shape
        like: dict[str, Any] = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        bound = 1 / math.sqrt(inputs)
        self.lora_a = nn.Parameter(torch.empty(inputs, rank, **like).uniform_(-bound, bound))
        self.lora_b = nn.Parameter(torch.zeros(rank, outputs, **like))

    @property
    def weight(self) -> Tensor:
        """Of the matrix without its adapter."""
        return self.linear.weight

    def added(self, x: Tensor) -> Tensor:
        return self.scale * ((self.dropout(x) @ self.lora_a) @ self.lora_b)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.added(x)


class DoRALinear(LoRALinear):
    """The same with each output's length learned apart: m / |W + scale (A B)^T| times it."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float, dropout: float):
        super().__init__(linear, rank, scale, dropout)
        self.m = nn.Parameter(linear.weight.detach().norm(dim=1))

    def forward(self, x: Tensor) -> Tensor:
        adapted_OD = self.linear.weight + self.scale * (self.lora_a @ self.lora_b).T
        share_O = self.m / adapted_OD.norm(dim=1).detach()
        y = share_O * (F.linear(x, self.linear.weight) + self.added(x))
        return y if self.linear.bias is None else y + self.linear.bias


LAYERS = {"lora": LoRALinear, "dora": DoRALinear}


class Adapters(Learner):
    """Adapters in the language model, and the projector where `unfreeze` names it."""

    def unfreeze_parts(self) -> None:
        """Add the adapters; their first values follow from the seed."""
        torch.manual_seed(self.config.seed)
        self._add()
        if self.trains("projector"):
            self.model.projector.requires_grad_(True)

    def _add(self) -> None:
        """Put an adapter in the place of each chosen matrix of the last layers."""
        language, settings = self.model.language, self.config.adapters
        if getattr(self.model.config.text, "num_experts", 0):
            raise UserError("adapters in a mixture of experts are MLX's alone")
        linear = {n for layer in language.layers for n, m in layer.named_modules() if _fits(m)}
        keys = settings.keys(linear)
        values = {name: settings.lora_parameters[name] for name in ("rank", "scale", "dropout")}
        for layer in language.layers[-max(settings.num_layers, 0) :]:
            for name in [n for n, m in layer.named_modules() if n in keys and _fits(m)]:
                parent, _, last = name.rpartition(".")
                adapter = LAYERS[settings.fine_tune_type](layer.get_submodule(name), **values)
                setattr(layer.get_submodule(parent), last, adapter)
        for name, adapter in adapters(self.model):
            (ours,) = to_ours(
                {f"{name}.weight": adapter.weight}, self.checkpoint.config, self.where
            )
            at = MODEL + ours.removesuffix(".weight")
            for key, parameter in adapter.named_parameters(recurse=False):
                self.beside[f"{at}.{key}"] = parameter

    def train(self, mode: bool = True) -> None:
        """With dropout, or without."""
        for _, adapter in adapters(self.model):
            adapter.dropout.train(mode)

    def save_model(self, folder: Path) -> None:
        """The adapters lie there already; MLX's `fuse` writes a model with them."""

    def save_adapters(self, folder: Path, iteration: int) -> None:
        """The files that mlx-lm writes, each whole or not at all."""
        tensors = {name.removeprefix(MODEL): tensor for name, tensor in self.saved().items()}
        write_adapters(folder, iteration, self.config.adapter_settings, tensors)


def adapters(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """Every adapter in a model, with the name of its module."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield name, module


def _fits(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)
