"""Times a request on torch_ref part by part, on CUDA, Apple's GPU or the CPU.

The reference is written for comparison, not for speed. Where tokens are dropped between the
language model's layers it reads prompts one by one and computes full attention matrices; all of
that counts as prefill here.
"""

import math
import time
from typing import Any

import torch
from torch import nn

from mlx_vlm_prune.checkpoints.config import VLMConfig
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.models.language.twig import Twig
from mlx_vlm_prune.pruners import METHODS, Pipeline
from torch_ref.models.language import twig
from torch_ref.models.loading import best_device
from torch_ref.models.vlm import VLM, Prefill
from torch_ref.pruners import METHODS as TWINS
from torch_ref.pruners import Step

from .model_shapes import Request
from .timing import PARTS, Run

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SCORERS = ("score_prune", "mlp", "learn_prune")  # learned methods with twins that any budget fits


def device() -> str:
    """The device's kind, and its name on CUDA."""
    kind = best_device().type
    return f"{kind} ({torch.cuda.get_device_name()})" if kind == "cuda" else kind


class Laps:
    """Milliseconds of each of PARTS; a lap ends when the device has finished its queue."""

    def __init__(self, device: torch.device):
        self.device, self.ms = device, dict.fromkeys(PARTS, 0.0)
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        elif self.device.type == "mps":
            torch.mps.synchronize()
        now = time.perf_counter()
        self.ms[name] += 1000 * (now - self.last)
        self.last = now


class Stack:
    """A model with random weights, ready to run requests."""

    def __init__(self, config: VLMConfig, dtype: str):
        torch.manual_seed(0)
        self.device = best_device()
        self.model = VLM(config).eval().to(self.device, DTYPES[dtype])
        self.laps: Laps | None = None
        for module, before, after in (
            (self.model.tower, None, "vision"),
            (self.model.projector, "pruner", "projector"),
            (self.model.language.embed_tokens, "pruner", None),  # the first step of splicing
        ):
            self._hook(module, before, after)

    def _hook(self, module: nn.Module, before: str | None, after: str | None) -> None:
        """End the lap `before` when a module starts, and `after` when it has run."""

        def end_lap(name: str) -> Any:
            return lambda *_: self.laps.lap(name) if self.laps else None

        if before:
            module.register_forward_pre_hook(end_lap(before))
        if after:
            module.register_forward_hook(end_lap(after))

    def learned(self, K: int) -> dict[str, Any]:
        """Random weights of the learned methods for a budget of K tokens, in both frameworks.

        The twins' weights go into torch_ref's model; MLX's are returned, to plan with.
        """
        c = self.model.config
        dims = c.vision.hidden_size * math.prod(c.merge or ())
        self.model.learned = {name: TWINS[name].make_weights(dims, K) for name in SCORERS}
        self.model.learned["twig"] = twig.grown(self.model.language, 1, 1)
        for weights in self.model.learned.values():
            weights.eval().to(self.device)
        mlx_weights = {name: METHODS[name].make_weights(dims, K) for name in SCORERS}
        return {**mlx_weights, "twig": Twig(c.text, 1, 1)}

    def steps(self, pipeline: Pipeline, K: int) -> list[Step]:
        """The chain as torch_ref's steps."""
        if any(step.name == "attention_pool" for step in pipeline.steps):
            raise UserError("attention_pool is measured with --backend mlx only")
        budgets = pipeline.budgets(self.model.N, K).per_step
        steps = [Step(s.name, k, dict(s.options)) for s, k in budgets]
        return [*steps, *(Step(e.name, None, dict(e.options)) for e in pipeline.enhancers)]

    @torch.no_grad()
    def run(self, request: Request, pipeline: Pipeline, K: int, tokens: int) -> Run:
        """Time the request from image files to first token, then `tokens` more."""
        steps = self.steps(pipeline, K)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.laps = laps = Laps(self.device)
        pixels_I3HW = torch.from_numpy(request.pixels_IHW3()).permute(0, 3, 1, 2)
        pixels_I3HW = pixels_I3HW.to(self.device, self.model.language.embed_tokens.weight.dtype)
        laps.lap("image")
        spliced = self.model.embed(request.rows, pixels_I3HW, steps, K, pipeline.positions)
        state = self.model.prefill(*spliced)
        first_B = state.logits_BV.argmax(-1)
        laps.lap("prefill")
        self.laps = None  # decoding embeds tokens too
        rows = state.cache or [layer for prompt in state.each for layer in prompt.layers]
        cache_bytes = sum(array.numel() * array.element_size() for layer in rows for array in layer)
        token_ids, token_ms = self.decode(state, first_B, tokens)
        peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None
        return Run(laps.ms, token_ms, cache_bytes, peak, token_ids)

    def decode(
        self, state: Prefill, token_B: torch.Tensor, tokens: int
    ) -> tuple[list[list[int]], float]:
        """Each prompt's first token and `tokens` more, and the mean milliseconds of a token."""
        token_ids = [token_B.tolist()]
        began = time.perf_counter()
        for _ in range(tokens):
            self.model.step(state, token_B)
            token_B = state.logits_BV.argmax(-1)
            token_ids.append(token_B.tolist())
        ms = 1000 * (time.perf_counter() - began)
        return [list(ids) for ids in zip(*token_ids, strict=True)], ms / max(1, tokens)
