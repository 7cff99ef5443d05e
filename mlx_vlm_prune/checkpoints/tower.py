"""Vision towers as Hugging Face publishes them: which tensors are theirs, and their sizes."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .config import CLIP_TYPE, NAFLEX_TYPE
from .errors import UserError, quoted
from .names.renaming import Tensors
from .reading.tensors import RawTensor, Shaped
from .shapes import layer_count, matrix_shape, tensor_shape

PREFIX = "vision_model."
# What nothing here reads: buffers, CLIP's half for text, and SigLIP's pooling head.
UNUSED = re.compile(
    r"vision_model\.(embeddings\.position_ids|head\..*)|text_model\..*"
    r"|(text|visual)_projection\..*|logit_scale|logit_bias"
)


def is_tower(name: str) -> bool:
    """Does this published name belong to a vision tower?"""
    return name.startswith(PREFIX)


def split_tower(state: Tensors) -> tuple[dict[str, RawTensor], dict[str, RawTensor]]:
    """The other tensors, and the tower's under Hugging Face's names; unused ones are left out."""
    used = {k.removeprefix("vision_encoder."): v for k, v in state.items() if "mask" not in k}
    if "embeddings.patch_embedding.weight" in used:  # a tower alone, as transformers 5 saves it
        used = {PREFIX + name: tensor for name, tensor in used.items()}
    used = {name: tensor for name, tensor in used.items() if not UNUSED.fullmatch(name)}
    tower = {name: tensor for name, tensor in used.items() if is_tower(name)}
    return {name: tensor for name, tensor in used.items() if name not in tower}, tower


def vision_config(
    tensors: Mapping[str, Shaped], tower_type: str, published: Mapping[str, Any], where: Path
) -> dict[str, Any]:
    """The tower's part of our config.json: sizes of its tensors, which have our names, and the rest
    of the config.json `published` with the tower, which may be a whole CLIP's or SigLIP's.

    Raises UserError where the two differ.
    """
    sizes = _sizes(tensors, tower_type, where)
    published = published.get("vision_config", published)
    if not isinstance(published, Mapping):
        raise UserError(f"{where}: vision_config must be an object")
    for name, size in sizes.items():
        if name == "image_size" and tower_type == NAFLEX_TYPE:
            continue
        if published.get(name, size) != size:
            raise UserError(
                f"{where}: config.json says {name} {quoted(published[name])}, but its tensors say"
                f" {size}"
            )
    is_clip = tower_type == CLIP_TYPE
    activation = "quick_gelu" if is_clip else "gelu_pytorch_tanh"
    if published.get("hidden_act", activation) != activation:
        title = "OpenAI's CLIP" if is_clip else "SigLIP"
        raise UserError(
            f"{where}: hidden_act is {quoted(published['hidden_act'])}; {title} has {activation}"
        )
    usual_heads = max(1, sizes["hidden_size"] // 64)
    return {
        **sizes,
        "hidden_act": activation,
        "layer_norm_eps": published.get("layer_norm_eps", 1e-05 if is_clip else 1e-06),
        "model_type": tower_type,
        "num_attention_heads": published.get("num_attention_heads", usual_heads),
    }


def _sizes(tensors: Mapping[str, Shaped], tower_type: str, where: Path) -> dict[str, int]:
    """The sizes that follow from shapes of tensors: all but the number of heads."""
    patch = tensor_shape(tensors, "tower.embeddings.patch_embedding.weight", where)[1]
    rows, width = matrix_shape(tensors, "tower.embeddings.position_embedding.weight", where)
    inner, _ = matrix_shape(tensors, "tower.encoder.layers.0.mlp.fc1.weight", where)
    patches = rows - (tower_type == CLIP_TYPE)  # CLIP has a row for CLS, too
    return {
        "hidden_size": width,
        "image_size": round(patches**0.5) * patch,
        "intermediate_size": inner,
        "num_hidden_layers": layer_count(tensors, r"tower\.encoder\.layers\.(\d+)\.", where),
        "patch_size": patch,
    }
