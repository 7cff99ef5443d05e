"""LLaVA-style models in the reference: a published folder as the reference's own modules."""

from dataclasses import replace
from pathlib import Path

import torch

from mlx_vlm_prune.checkpoints.config import CONFIG, MlxLmConfig, parse_config
from mlx_vlm_prune.checkpoints.families import read_checkpoint
from mlx_vlm_prune.checkpoints.llava.layouts import REFERENCE
from mlx_vlm_prune.checkpoints.llava.published import published_tensors

from .vlm import VLM, _tensor, best_device


def read(
    folder: str | Path, device: torch.device | None = None, tower: str | Path | None = None
) -> VLM:
    """A LLaVA as transformers or its authors wrote it, in float32, on the best device unless one
    is given. `tower` is the folder of one that lies apart.

    Raises UserError for what cannot be read or holds another model.
    """
    where = Path(folder)
    checkpoint = read_checkpoint(where, Path(tower) if tower else None)
    config, layout, text = parse_config(checkpoint.config, where / CONFIG), REFERENCE, None
    if isinstance(config.text, MlxLmConfig):
        whole, kind = checkpoint.config["published"], config.text.model_type
        text = whole.get("text_config") or {**whole, "model_type": kind}
        layout = replace(REFERENCE, text="model.stock")
    model = VLM(config, text)
    state = published_tensors(checkpoint.tensors, layout, checkpoint.config, where)
    model.load_state_dict({name: _tensor(raw) for name, raw in state.items()})
    return model.eval().to(device or best_device())
