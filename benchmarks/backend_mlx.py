"""Times a request on MLX part by part, on MLX's default device."""

import time
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_vlm_prune.checkpoints.config import MiniMindConfig, VLMConfig
from mlx_vlm_prune.generation.steps import generate_step, greedy
from mlx_vlm_prune.machine.clock import Clock
from mlx_vlm_prune.models.language.twig import Twig
from mlx_vlm_prune.models.loading import DTYPES
from mlx_vlm_prune.models.vlm import VLM, Prefill
from mlx_vlm_prune.pruners import METHODS, Pipeline

from .model_shapes import Request
from .timing import PARTS, Run


def device() -> str:
    """The device's kind, and its name where MLX has one."""
    kind = "cpu" if mx.default_device().type == mx.DeviceType.cpu else "gpu"
    info = mx.device_info() if kind == "gpu" else {}
    return f"{kind} ({info['device_name']})" if "device_name" in info else kind


class Stack:
    """A model with random weights, ready to run requests."""

    def __init__(self, config: VLMConfig, dtype: str):
        mx.random.seed(0)
        self.model = VLM(config)
        self.model.set_dtype(DTYPES[dtype])
        mx.eval(self.model.parameters())

    def learned(self, K: int) -> dict[str, Any]:
        """Random weights of the learned methods for a budget of K tokens."""
        dims, text = self.model.feature_dims, self.model.config.text
        scorers = ("attention_pool", "score_prune", "mlp", "learn_prune")
        weights = {name: METHODS[name].make_weights(dims, K) for name in scorers}
        assert isinstance(text, MiniMindConfig)
        twig = Twig(text, 1, 1)
        twig.set_dtype(self.model.dtype)  # it reads the model's hidden states
        return {**weights, "twig": twig}

    def run(self, request: Request, pipeline: Pipeline, K: int, tokens: int) -> Run:
        """Time the request from image files to first token, then `tokens` more."""
        mx.reset_peak_memory()
        with Clock(PARTS).running() as clock:
            pixels = mx.array(request.pixels_IHW3()).astype(self.model.dtype)
            clock.end_part("image", pixels)
            prefill = self.model(request.rows, pixels, pipeline, K)
            first_B1 = clock.end_part("prefill", greedy(prefill.logits_BV))
        cache_bytes = prefill.cache_bytes
        answer, token_ms = self.decode(prefill, first_B1, tokens)
        return Run(clock.ms, token_ms, cache_bytes, mx.get_peak_memory(), answer)

    def decode(
        self, prefill: Prefill, first_B1: mx.array, tokens: int
    ) -> tuple[list[list[int]], float]:
        """Each prompt's first token and `tokens` more, and the mean milliseconds of a token."""
        start = time.perf_counter()
        steps = generate_step(prefill, first_B1, greedy, tokens + 1)
        answer = np.concatenate([np.array(token_B1) for token_B1 in steps], axis=1)
        ms = 1000 * (time.perf_counter() - start)
        return answer.tolist(), ms / max(1, tokens)
