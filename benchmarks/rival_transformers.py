"""torch_ref and transformers' models with the same weights, the pair that rivals.py times.

Shapes: B prompts (1 here), I images (1), N visual tokens, L rows, D features, V words.
"""

import copy
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from mlx_vlm_prune.checkpoints.config import MiniMindConfig, VLMConfig
from mlx_vlm_prune.inputs.prompt import Prompt
from torch_ref.models.language.minimind import MiniMind
from torch_ref.models.language.transformers import cache_name
from torch_ref.models.loading import best_device
from torch_ref.models.towers.vit import VisionTower
from torch_ref.models.vlm import VLM, Prefill

from .model_shapes import request


class OurStack:
    """torch_ref's VLM, unpruned."""

    def __init__(self, model: VLM, prompt: Prompt, pixels_13HW: Tensor):
        self.model, self.prompt, self.pixels_13HW = model, prompt, pixels_13HW

    def prompt_logits(self) -> np.ndarray:
        return self.model.logits([self.prompt], self.pixels_13HW)[0].cpu().numpy()

    def prefill(self) -> tuple[Tensor, Prefill]:
        state = self.model.prefill(*self.model.embed([self.prompt], self.pixels_13HW))
        return state.logits_BV, state

    def step(self, token_B: Tensor, state: Prefill) -> Tensor:
        self.model.step(state, token_B)
        return state.logits_BV


class TheirStack:
    """transformers' tower and language model around a copy of our projector.

    transformers has no class for such a projector.
    """

    def __init__(self, model: VLM, prompt: Prompt, pixels_13HW: Tensor):
        self.prompt, self.pixels_13HW = prompt, pixels_13HW
        self.has_cls = model.tower.has_cls
        self.tower = transformers_tower(model.tower)
        self.projector = copy.deepcopy(model.projector)
        self.language = transformers_language(model.language)
        for part in (self.tower, self.projector, self.language):
            part.eval().requires_grad_(False).to(pixels_13HW.device)

    def embed_prompt(self) -> Tensor:
        """Embeddings of the prompt with its image's in their place, (1, L, D)."""
        x_1ND = self.tower(self.pixels_13HW).last_hidden_state
        visual_1ND = self.projector(x_1ND[:, 1:] if self.has_cls else x_1ND)
        ids_1L = torch.tensor([self.prompt.ids], device=self.pixels_13HW.device)
        text_1LD = self.language.get_input_embeddings()(ids_1L)
        ((start, length),) = self.prompt.runs
        end = start + length
        return torch.cat([text_1LD[:, :start], visual_1ND, text_1LD[:, end:]], dim=1)

    def prompt_logits(self) -> np.ndarray:
        return self.language(inputs_embeds=self.embed_prompt()).logits[0].cpu().numpy()

    def prefill(self) -> tuple[Tensor, Any]:
        cache = transformers.DynamicCache()
        return self._logits(cache, inputs_embeds=self.embed_prompt()), cache

    def step(self, token_B: Tensor, cache: Any) -> Tensor:
        return self._logits(cache, input_ids=token_B[:, None])

    def _logits(self, cache: Any, **inputs: Any) -> Tensor:
        """Logits (1, V) of the last row."""
        inputs[cache_name(self.language)] = cache
        return self.language(**inputs, use_cache=True, logits_to_keep=1).logits[:, -1]


def transformers_tower(tower: VisionTower) -> Any:
    """transformers' tower with the same weights."""
    sizes = {**asdict(tower.config), "attn_implementation": "sdpa"}
    if tower.has_cls:
        model: Any = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**sizes))
    else:
        config = transformers.SiglipVisionConfig(**sizes, vision_use_head=False)
        model = transformers.SiglipVisionModel(config)
    model.load_state_dict(tower.state_dict())
    return model


def transformers_language(language: MiniMind) -> Any:
    """transformers' Llama or Qwen3 with the same weights."""
    config = {**text_sizes(language.config), "attn_implementation": "sdpa"}
    if language.config.qk_norm:
        model: Any = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**config))
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    state = {f"model.{name}": weight for name, weight in language.state_dict().items()}
    model.load_state_dict(state | {"lm_head.weight": state["model.embed_tokens.weight"]})
    return model


def text_sizes(c: MiniMindConfig) -> dict[str, Any]:
    """The sizes by the names that transformers' Llama and Qwen3 configs share."""
    shared_names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "head_dim",
    )  # fmt: skip
    return {
        **{name: getattr(c, name) for name in shared_names},
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
        "tie_word_embeddings": True,
    }


def make_stacks(config: VLMConfig) -> tuple[OurStack, TheirStack]:
    """Both stacks with the same weights, preprocessed photograph and prompt."""
    no_merge = config.projector is None or config.projector.merge == (1, 1)
    assert no_merge, "transformers has no class that merges patches"
    torch.manual_seed(0)
    model = VLM(config).eval().requires_grad_(False).to(best_device())
    randomize_vectors(model)
    inputs = request(config)
    pixels_13HW = torch.from_numpy(inputs.pixels_IHW3()).permute(0, 3, 1, 2).contiguous()
    prompt, pixels_13HW = inputs.rows[0], pixels_13HW.to(best_device())
    return OurStack(model, prompt, pixels_13HW), TheirStack(model, prompt, pixels_13HW)


def randomize_vectors(model: nn.Module) -> None:
    """Add noise to norms and biases: at their initial ones and zeros a swapped one is not seen."""
    for weight in model.parameters():
        if weight.ndim == 1:
            weight.add_(0.1 * torch.randn_like(weight))


def argmax_token(logits_BV: Tensor) -> Tensor:
    """The likeliest next token, (B,)."""
    return logits_BV.argmax(-1)
