"""torch_ref and transformers' own classes with the same weights, for benchmarks/rivals.py.

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
from torch_ref.models.towers.vit import VisionTower
from torch_ref.models.vlm import VLM, Decoding, best_device

from .model_shapes import request


class Ours:
    """The reference, full."""

    def __init__(self, model: VLM, row: Prompt, pixels_13HW: Tensor):
        self.model, self.row, self.pixels_13HW = model, row, pixels_13HW

    def every_row(self) -> np.ndarray:
        return self.model.logits([self.row], self.pixels_13HW)[0].cpu().numpy()

    def read(self) -> tuple[Tensor, Decoding]:
        state = self.model.prefill(*self.model.read([self.row], self.pixels_13HW))
        return state.logits_BV, state

    def step(self, token_B: Tensor, state: Decoding) -> Tensor:
        self.model.step(state, token_B)
        return state.logits_BV


class Theirs:
    """Their tower and language model; between them the projector, which they have no class for."""

    def __init__(self, model: VLM, row: Prompt, pixels_13HW: Tensor):
        self.row, self.pixels_13HW = row, pixels_13HW
        self.has_cls = model.tower.has_cls
        self.tower = tower(model.tower)
        self.projector = copy.deepcopy(model.projector)
        self.language = language(model.language)
        for part in (self.tower, self.projector, self.language):
            part.eval().requires_grad_(False).to(pixels_13HW.device)

    def embeds(self) -> Tensor:
        """The prompt's words and, in their middle, its picture, (1, L, D)."""
        x_1ND = self.tower(self.pixels_13HW).last_hidden_state
        visual_1ND = self.projector(x_1ND[:, 1:] if self.has_cls else x_1ND)
        ids_1L = torch.tensor([self.row.ids], device=self.pixels_13HW.device)
        words_1LD = self.language.get_input_embeddings()(ids_1L)
        ((start, length),) = self.row.runs
        end = start + length
        return torch.cat([words_1LD[:, :start], visual_1ND, words_1LD[:, end:]], dim=1)

    def every_row(self) -> np.ndarray:
        return self.language(inputs_embeds=self.embeds()).logits[0].cpu().numpy()

    def read(self) -> tuple[Tensor, Any]:
        cache = transformers.DynamicCache()
        return self._logits(cache, inputs_embeds=self.embeds()), cache

    def step(self, token_B: Tensor, cache: Any) -> Tensor:
        return self._logits(cache, input_ids=token_B[:, None])

    def _logits(self, cache: Any, **given: Any) -> Tensor:
        """Of the last row only."""
        given[cache_name(self.language)] = cache
        return self.language(**given, use_cache=True, logits_to_keep=1).logits[:, -1]


def tower(own: VisionTower) -> Any:
    """transformers' tower with the same weights."""
    sizes = {**asdict(own.config), "attn_implementation": "sdpa"}
    if own.has_cls:
        made: Any = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**sizes))
    else:
        config = transformers.SiglipVisionConfig(**sizes, vision_use_head=False)
        made = transformers.SiglipVisionModel(config)
    made.load_state_dict(own.state_dict())
    return made


def language(own: MiniMind) -> Any:
    """transformers' Llama or Qwen3 with the same weights."""
    config = {**text_sizes(own.config), "attn_implementation": "sdpa"}
    if own.config.qk_norm:
        made: Any = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**config))
    else:
        made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    state = {f"model.{name}": weight for name, weight in own.state_dict().items()}
    made.load_state_dict(state | {"lm_head.weight": state["model.embed_tokens.weight"]})
    return made


def text_sizes(c: MiniMindConfig) -> dict[str, Any]:
    """In transformers' words, which both of its families share."""
    same = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "head_dim",
    )  # fmt: skip
    return {
        **{name: getattr(c, name) for name in same},
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
        "tie_word_embeddings": True,
    }


def sides(config: VLMConfig) -> tuple[Ours, Theirs]:
    """Both, with a photograph whose pixels are ready and a prompt around it."""
    assert config.projector is None or config.projector.merge == (1, 1), "no class of theirs merges"
    torch.manual_seed(0)
    model = VLM(config).eval().requires_grad_(False).to(best_device())
    shake(model)
    asked = request(config)
    pixels_13HW = torch.from_numpy(asked.pixels_IHW3()).permute(0, 3, 1, 2).contiguous()
    told = asked.rows[0], pixels_13HW.to(best_device())
    return Ours(model, *told), Theirs(model, *told)


def shake(model: nn.Module) -> None:
    """Norms of one and biases of nothing, as they are made, would hide that one is another's."""
    for weight in model.parameters():
        if weight.ndim == 1:
            weight.add_(0.1 * torch.randn_like(weight))


def likeliest(logits_BV: Tensor) -> Tensor:
    """The next token, (B,)."""
    return logits_BV.argmax(-1)
