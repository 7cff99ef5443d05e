"""Small random LLaVAs whose language models mlx-lm computes, made and saved by transformers.

Shapes: I images, L rows, V words, D features.
"""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from transformers import (
    CLIPVisionConfig,
    GemmaConfig,
    LlamaConfig,
    LlavaConfig,
    Mamba2Config,
    MambaConfig,
    PhiConfig,
    Qwen3Config,
    SiglipVisionConfig,
)
from transformers import LlavaForConditionalGeneration as Llava

from mlx_vlm_prune import load
from mlx_vlm_prune.checkpoints.llava.sizes import text_config
from mlx_vlm_prune.inputs.prompt import Prompt
from mlx_vlm_prune.models.language.mlx_lm import MlxLm
from torch_ref.models.loading import load_llava

from . import llava
from .llava import IMAGE, SIZES, TOWER

CLIP, SIGLIP = CLIPVisionConfig(**TOWER), SiglipVisionConfig(**TOWER)
FULL = {"vision_feature_select_strategy": "full"}
TURNS = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
SCANNED = {k: SIZES[k] for k in ("hidden_size", "num_hidden_layers", "vocab_size")}
KINDS = {
    "llama": (
        LlamaConfig(
            **SIZES, num_key_value_heads=2, head_dim=24, attention_bias=True, mlp_bias=True,
            rope_parameters=TURNS,
        ),
        CLIP, {},
    ),
    "qwen3": (
        Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=32, tie_word_embeddings=True),
        SIGLIP, FULL,
    ),
    "phi": (
        PhiConfig(
            **SIZES, num_key_value_heads=2,
            rope_parameters={
                "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5,
            },
        ),
        CLIP, {},
    ),
    "gemma": (GemmaConfig(**SIZES, num_key_value_heads=1, head_dim=32), SIGLIP, FULL),
    "mamba": (MambaConfig(**SCANNED, state_size=6, tie_word_embeddings=False), CLIP, {}),
    "mamba2": (
        Mamba2Config(
            **SCANNED, state_size=6, num_heads=8, head_dim=16, n_groups=1, use_bias=True,
        ),
        SIGLIP, FULL,
    ),
}  # fmt: skip


SCANS = ("mamba", "mamba2")  # kinds without attention


def random_model(kind: str, seed: int = 0) -> Llava:
    """Random, its scores well apart."""
    torch.manual_seed(seed)
    text, vision, more = KINDS[kind]
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, **more)
    model = Llava(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def write(kind: str, folder: Path, **options) -> Path:
    """FOLDER as transformers saves it."""
    return llava.write(random_model(kind), folder, **options)


def theirs(model: Llava, prompt: Prompt, pixels_I3HW: torch.Tensor) -> np.ndarray:
    """Logits of transformers, (L, V). Its LLaVA cannot run its Mamba, so the language model gets
    the same embeddings here."""
    inner, ids_1L = model.model, torch.tensor([prompt.ids])
    with torch.no_grad():
        x_1LD = inner.get_input_embeddings()(ids_1L)
        features = inner.get_image_features(pixel_values=pixels_I3HW).pooler_output
        x_1LD[ids_1L == IMAGE] = torch.cat(list(features))
        return model.lm_head(inner.language_model(inputs_embeds=x_1LD)[0])[0].numpy()


LIGHTVLM = {  # CLIP-L/336 and microsoft/phi-2's config.json, put together as LLaVA-1.5 is
    **llava.SEVEN_BILLION,
    "text_config": {
        "model_type": "phi", "hidden_size": 2560, "intermediate_size": 10240,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
        "vocab_size": 51200, "layer_norm_eps": 1e-5, "partial_rotary_factor": 0.4,
        "rope_theta": 10000.0, "hidden_act": "gelu_new", "qk_layernorm": False,
        "max_position_embeddings": 2048,
    },
}  # fmt: skip


def write_lightvlm(folder: Path) -> None:
    """Names and shapes of every tensor; the values take no disk."""
    text = text_config(LIGHTVLM["text_config"], LIGHTVLM, folder, has_head=True, has_head_bias=True)
    llava.write_without_values(folder, LIGHTVLM, text)


def loader(new_folder: Callable[[str], Path]) -> Callable[[str], SimpleNamespace]:
    """Each kind's weights in transformers, in the reference and in MLX, loaded once."""
    loaded: dict[str, SimpleNamespace] = {}

    def models(kind: str) -> SimpleNamespace:
        if kind not in loaded:
            folder = write(kind, new_folder("hf"))
            model, processor = load(folder, dtype="float32")
            assert isinstance(model.language, MlxLm)
            loaded[kind] = SimpleNamespace(
                theirs=random_model(kind), reference=load_llava(folder, torch.device("cpu")),
                ours=model, folder=folder, processor=processor,
            )  # fmt: skip
        return loaded[kind]

    return models
