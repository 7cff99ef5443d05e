"""`grad_checkpoint`: layers are computed again in the backward pass: less memory, more time."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mlx_vlm_prune.checkpoints.errors import UserError

from ..models.language.minimind import MiniMind
from ..models.vlm import VLM
from ..pruners import Step


def recompute_layers(model: VLM, steps: Sequence[Step]) -> None:
    """Let the language model's layers hold only their inputs. Raises UserError."""
    for step in steps:
        if step.stage == "decoder":
            raise UserError(
                f"grad_checkpoint cannot be used with {step.name}, which drops tokens between the"
                " language model's layers"
            )
    if not isinstance(model.language, MiniMind):
        raise UserError("grad_checkpoint needs a language model of MiniMind's or Llama's kind")
    for layer in model.language.layers:
        layer.forward = partial(_forward, layer.forward)


def _forward(
    forward: Callable[..., Tensor], x: Tensor, rotary: Any, visible: Tensor | None,
    rows: list[Tensor] | None,
) -> Tensor:  # fmt: skip
    if rows is not None or not torch.is_grad_enabled():
        return forward(x, rotary, visible, rows)
    result: Tensor = checkpoint(forward, x, rotary, visible, None, use_reentrant=False)
    return result
