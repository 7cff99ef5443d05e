"""An untrained projector for a MiniMind that reads no images yet, under its published names."""

from pathlib import Path

import numpy as np

from ..errors import UserError
from ..names.renaming import Tensors
from ..reading.tensors import RawTensor
from ..shapes import matrix_shape, tensor_shape

PROJECTOR = "vision_proj."
EMBEDDINGS = ("model.embed_tokens.weight", "tok_embeddings.weight")
PATCHES = "vision_model.embeddings.patch_embedding.weight"


def untrained_projector(
    language: Tensors, tower: Tensors, seed: int, where: Path
) -> dict[str, RawTensor]:
    """MiniMind2's matrix, or MiniMind-3's norm and two layers, as torch begins them.

    It is in the language model's dtype. Raises UserError without a language model or a tower.
    """
    name = next((name for name in EMBEDDINGS if name in language), EMBEDDINGS[0])
    hidden, dtype = matrix_shape(language, name, where)[1], language[name].dtype
    if not tower:
        raise UserError(f"{where}: a projector needs the vision tower that it reads")
    width, random = tensor_shape(tower, PATCHES, where)[0], np.random.default_rng(seed)

    def tensor(values: np.ndarray) -> RawTensor:
        data = values.astype(np.float32)
        return RawTensor("F32", data.shape, data.reshape(-1).view(np.uint8)).astype(dtype)

    def linear(name: str, dims: int) -> dict[str, RawTensor]:
        most = dims**-0.5
        shapes = {"weight": (hidden, dims), "bias": (hidden,)}
        return {f"{name}.{k}": tensor(random.uniform(-most, most, s)) for k, s in shapes.items()}

    if not any(".q_norm." in name for name in language):
        return linear("vision_proj.vision_proj.0", width)
    norm = {"weight": np.ones(width), "bias": np.zeros(width)}
    return {
        **{f"vision_proj.mlp.0.{key}": tensor(values) for key, values in norm.items()},
        **linear("vision_proj.mlp.1", width),
        **linear("vision_proj.mlp.3", hidden),
    }
