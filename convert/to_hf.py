"""`to-hf`: write for transformers what it can run of a folder of ours.

Of a MiniMind-V that is the language model, of a LLaVA the whole model.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_vlm_prune.checkpoints.config import VLMConfig
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.checkpoints.families import is_llava, published_layout, read_ours
from mlx_vlm_prune.checkpoints.llava import original
from mlx_vlm_prune.checkpoints.llava.layouts import LAYOUTS
from mlx_vlm_prune.checkpoints.llava.published import (
    TRANSFORMERS_CLASS,
    published_config,
    published_tensors,
)
from mlx_vlm_prune.checkpoints.minimind.tables import LLAMA
from mlx_vlm_prune.checkpoints.names.renaming import to_published_layout
from mlx_vlm_prune.checkpoints.processor import CARRIED_FILES, PREPROCESSOR_CONFIG, TOKENIZER_FILES
from mlx_vlm_prune.checkpoints.reading.files import atomic_path, read_json, write_json
from mlx_vlm_prune.checkpoints.reading.tensors import RawTensor

from .folders import fill_folder
from .to_torch import llava_to_torch

Tensors = Mapping[str, RawTensor]


def to_hf(source: Path, target: Path) -> str:
    """Write a folder for transformers; return the name of the class that reads it.

    Raises UserError where transformers has no class that computes the same.
    The folder appears complete or not at all.
    """
    config, sizes, tensors = read_ours(source)
    if is_llava(config):
        return _llava_to_hf(source, target, config, sizes, tensors)
    return _minimind_to_hf(source, target, config, sizes, tensors)


def _minimind_to_hf(
    source: Path, target: Path, config: Mapping[str, Any], sizes: VLMConfig, tensors: Tensors
) -> str:
    """Write the language model."""
    generation, head_dim = published_layout(config, source), sizes.text.head_dim
    kind = "experts" if config["text_config"].get("num_experts") else "dense"
    name = generation.transformers_classes.get(kind)
    if name is None:
        raise UserError(
            f"{source}: transformers has no class for {generation.title} with a mixture of experts"
        )
    language = {k: tensor for k, tensor in tensors.items() if k.startswith("language.")}
    state = to_published_layout(language, LLAMA, head_dim, source)
    with atomic_path(target, folder=True) as folder:
        text_config = _minimind_config(name, config, head_dim)
        fill_folder(folder, text_config, state, TOKENIZER_FILES, source)
    return name


def _minimind_config(class_name: str, config: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
    """The config.json of transformers' class for the language model."""
    text = {k: v for k, v in config["text_config"].items() if k != "qk_norm"}
    published: dict[str, Any] = {
        **text,
        "architectures": [class_name],
        "attention_bias": False,
        "eos_token_id": config.get("eos_token_id"),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "model_type": "llama" if class_name.startswith("Llama") else "qwen3",
        "torch_dtype": config.get("torch_dtype", "float32"),
    }
    if text.get("num_experts"):
        inner = text["intermediate_size"]
        published |= {"model_type": "qwen3_moe", "moe_intermediate_size": inner}
        published |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}
    return published


def _llava_to_hf(
    source: Path, target: Path, config: Mapping[str, Any], sizes: VLMConfig, tensors: Tensors
) -> str:
    """Write the model as published; one in its authors' layout, in that of transformers."""
    published = published_config(config, source)
    if not original.is_original(published):
        llava_to_torch(source, target, None, config, tensors)
        return TRANSFORMERS_CLASS
    hf_config = original.transformers_config(config, sizes, source)
    state = published_tensors(tensors, LAYOUTS["llava-hf"], config, source)
    with atomic_path(target, folder=True) as folder:
        fill_folder(folder, hf_config, state, [*TOKENIZER_FILES, *CARRIED_FILES], source)
        if (source / PREPROCESSOR_CONFIG).is_file():
            preprocessor = read_json(source / PREPROCESSOR_CONFIG)
            if original.pads_to_square(published):
                preprocessor |= {"do_pad": True, "image_processor_type": "LlavaImageProcessor"}
            write_json(folder / PREPROCESSOR_CONFIG, preprocessor)
    return TRANSFORMERS_CLASS
