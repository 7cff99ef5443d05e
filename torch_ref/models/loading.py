"""Load a model of the reference from published files, in float32, ready to answer."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mlx_vlm_prune.checkpoints.checkpoint import Checkpoint
from mlx_vlm_prune.checkpoints.config import CONFIG, MlxLmConfig, parse_config, parse_sizes
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.checkpoints.families import is_ours, read_checkpoint
from mlx_vlm_prune.checkpoints.llava.published import is_llava_folder
from mlx_vlm_prune.checkpoints.minimind.published import read_published, torch_tensors
from mlx_vlm_prune.checkpoints.reading.tensors import RawTensor

from .names import to_reference
from .vlm import VLM

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def best_device() -> torch.device:
    """CUDA, else Apple's GPU, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def load_pth(
    path: str | Path, tower: str | Path | None = None, device: torch.device | None = None
) -> VLM:
    """A MiniMind-V of any supported release: a .pth, and the folder of its tower (None: beside it).

    On the best device unless one is given. Raises UserError for files that cannot be read or that
    hold another model.
    """
    published = read_published(Path(path), Path(tower) if tower else None)
    config = parse_sizes(published.sizes, Path(path))
    model = VLM(config)
    prefix = {True: "vision_encoder.", False: ""}
    state = {
        prefix[name.startswith("vision_model.")] + name: to_tensor(raw)
        for name, raw in torch_tensors(published, config.text.head_dim).items()
    }
    model.load_state_dict(state)
    return model.eval().to(device or best_device())


def load_llava(
    folder: str | Path, device: torch.device | None = None, tower: str | Path | None = None
) -> VLM:
    """A LLaVA as transformers or its authors wrote it. `tower` is a folder of its own.

    On the best device unless one is given. Raises UserError for what cannot be read or holds
    another model.
    """
    where = Path(folder)
    checkpoint = read_checkpoint(where, Path(tower) if tower else None)
    return load_checkpoint(checkpoint, where, device)


def load_source(source: Path, tower: Path | None = None, device: torch.device | None = None) -> VLM:
    """A model of any family, from its published files or from a folder of ours.

    `tower` is the folder of a tower that lies apart; without it, it is looked for beside `source`.
    Raises UserError.
    """
    if is_ours(source) or is_llava_folder(source):
        return load_llava(source, device, tower)
    return load_pth(source, tower, device)


def load_folder(folder: Path, device: torch.device | None = None) -> tuple[VLM, Checkpoint]:
    """A model of any family, ours too, from a folder, and the rest of its checkpoint.

    Raises UserError for what cannot be read, holds another model or is quantized.
    """
    checkpoint = read_checkpoint(folder)
    return load_checkpoint(checkpoint, folder, device), checkpoint


def load_checkpoint(checkpoint: Checkpoint, where: Path, device: torch.device | None = None) -> VLM:
    """The model of a checkpoint that was read from `where`. Raises UserError."""
    if checkpoint.config.get("quantization"):
        raise UserError(f"{where} is quantized; dequantize it by convert to-mlx first")
    config, text = parse_config(checkpoint.config, where / CONFIG), None
    if isinstance(config.text, MlxLmConfig):
        published, kind = checkpoint.config["published"], config.text.model_type
        text = published.get("text_config") or {**published, "model_type": kind}
    model = VLM(config, text)
    state = to_reference(checkpoint.tensors, checkpoint.config, where)
    model.load_state_dict({name: to_tensor(raw) for name, raw in state.items()})
    return model.eval().to(device or best_device())


def to_tensor(raw: RawTensor) -> Tensor:
    """The same bits as a tensor."""
    return torch.from_numpy(np.array(raw.data)).view(DTYPES[raw.dtype]).reshape(raw.shape)
