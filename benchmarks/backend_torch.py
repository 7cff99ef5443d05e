"""A request on torch_ref, timed part by part, on CUDA, Apple's GPU or the CPU.

The reference is written to be compared with, not to be fast: where tokens leave between the
language model's layers it reads prompts one by one and computes whole attention matrices, all of
which counts as prefill here.
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
from torch_ref.models.vlm import VLM, Decoding, best_device
from torch_ref.pruners import METHODS as TWINS
from torch_ref.pruners import Step

from .model_shapes import Request
from .timing import PARTS, Run

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def device() -> str:
    """Its kind, and its name where torch tells one."""
    kind = best_device().type
    return f"{kind} ({torch.cuda.get_device_name()})" if kind == "cuda" else kind


class Laps:
    """Milliseconds of each part; a lap ends when the device has done all it was given."""

    def __init__(self, at: torch.device):
        self.at, self.ms = at, dict.fromkeys(PARTS, 0.0)
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        if self.at.type == "cuda":
            torch.cuda.synchronize()
        elif self.at.type == "mps":
            torch.mps.synchronize()
        now = time.perf_counter()
        self.ms[name] += 1000 * (now - self.last)
        self.last = now


class Stack:
    """A random model, ready to be asked."""

    def __init__(self, config: VLMConfig, dtype: str):
        torch.manual_seed(0)
        self.at = best_device()
        self.model = VLM(config).eval().to(self.at, DTYPES[dtype])
        self.laps: Laps | None = None
        for module, before, after in (
            (self.model.tower, None, "vision"),
            (self.model.projector, "pruner", "projector"),
            (self.model.language.embed_tokens, "pruner", None),  # splicing begins with words
        ):
            self._listen(module, before, after)

    def _listen(self, module: nn.Module, before: str | None, after: str | None) -> None:
        """End a lap when a part of the model begins or ends."""

        def ends(name: str) -> Any:
            return lambda *_: self.laps.lap(name) if self.laps else None

        if before:
            module.register_forward_pre_hook(ends(before))
        if after:
            module.register_forward_hook(ends(after))

    def learned(self, K: int) -> dict[str, Any]:
        """Stand-ins for the learned methods' weights, so that their names are understood."""
        c = self.model.config
        dims = c.vision.hidden_size * math.prod(c.merge or ())
        self.model.learned = {
            name: TWINS[name].make_weights(dims, K) for name in ("score_prune", "mlp")
        }
        self.model.learned["twig"] = twig.grown(self.model.language, 1, 1)
        for weights in self.model.learned.values():
            weights.eval().to(self.at)
        known = {name: METHODS[name].make_weights(dims, K) for name in ("score_prune", "mlp")}
        return {**known, "twig": Twig(c.text, 1, 1)}

    def steps(self, pipeline: Pipeline, K: int) -> list[Step]:
        """The chain in the reference's words."""
        if any(step.name == "attention_pool" for step in pipeline.steps):
            raise UserError("attention_pool is measured with --backend mlx only")
        budgets = pipeline.budgets(self.model.N, K).per_step
        told = [Step(s.name, k, dict(s.options)) for s, k in budgets]
        enhancer = pipeline.enhancer
        return [*told, Step(enhancer.name, None, dict(enhancer.options))] if enhancer else told

    @torch.no_grad()
    def run(self, asked: Request, pipeline: Pipeline, K: int, tokens: int) -> Run:
        """From the images' files to the first token, then so many more."""
        steps = self.steps(pipeline, K)
        if self.at.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.laps = laps = Laps(self.at)
        pixels_I3HW = torch.from_numpy(asked.pixels_IHW3()).permute(0, 3, 1, 2)
        pixels_I3HW = pixels_I3HW.to(self.at, self.model.language.embed_tokens.weight.dtype)
        laps.lap("image")
        read = self.model.read(asked.rows, pixels_I3HW, steps, K, pipeline.positions)
        state = self.model.prefill(*read)
        first_B = state.logits_BV.argmax(-1)
        laps.lap("prefill")
        self.laps = None  # words of decoding are no laps
        rows = state.cache or [layer for one in state.each for layer in one.rows]
        held = sum(array.numel() * array.element_size() for layer in rows for array in layer)
        said, token_ms = self.say(state, first_B, tokens)
        peak = torch.cuda.max_memory_allocated() if self.at.type == "cuda" else None
        return Run(laps.ms, token_ms, held, peak, said)

    def say(
        self, state: Decoding, token_B: torch.Tensor, tokens: int
    ) -> tuple[list[list[int]], float]:
        """So many more tokens, whatever they are, and the milliseconds of each on average."""
        said = [token_B.tolist()]
        began = time.perf_counter()
        for _ in range(tokens):
            self.model.step(state, token_B)
            token_B = state.logits_BV.argmax(-1)
            said.append(token_B.tolist())
        took = 1000 * (time.perf_counter() - began)
        return [list(own) for own in zip(*said, strict=True)], took / max(1, tokens)
