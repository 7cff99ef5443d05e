"""A request on MLX, timed part by part, on whatever device is MLX's default."""

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
    """Its kind, and its name where MLX tells one."""
    kind = "cpu" if mx.default_device().type == mx.DeviceType.cpu else "gpu"
    told = mx.device_info() if kind == "gpu" else {}
    return f"{kind} ({told['device_name']})" if "device_name" in told else kind


class Stack:
    """A random model, ready to be asked."""

    def __init__(self, config: VLMConfig, dtype: str):
        mx.random.seed(0)
        self.model = VLM(config)
        self.model.set_dtype(DTYPES[dtype])
        mx.eval(self.model.parameters())

    def learned(self, K: int) -> dict[str, Any]:
        """Random weights of the learned methods, for a budget of K."""
        dims, text = self.model.feature_dims, self.model.config.text
        scorers = ("attention_pool", "score_prune", "mlp")
        made = {name: METHODS[name].make_weights(dims, K) for name in scorers}
        assert isinstance(text, MiniMindConfig)
        return {**made, "twig": Twig(text, 1, 1)}

    def run(self, asked: Request, pipeline: Pipeline, K: int, tokens: int) -> Run:
        """From the images' files to the first token, then so many more."""
        mx.reset_peak_memory()
        with Clock(PARTS).running() as clock:
            pixels = mx.array(asked.pixels_IHW3()).astype(self.model.dtype)
            clock.lap("image", pixels)
            prefill = self.model(asked.rows, pixels, pipeline, K)
            first_B1 = clock.lap("prefill", greedy(prefill.logits_BV))
        cache_bytes = prefill.cache_bytes
        answer, token_ms = self.say(prefill, first_B1, tokens)
        return Run(clock.ms, token_ms, cache_bytes, mx.get_peak_memory(), answer)

    def say(
        self, prefill: Prefill, first_B1: mx.array, tokens: int
    ) -> tuple[list[list[int]], float]:
        """So many more tokens, whatever they are, and the milliseconds of each on average."""
        start = time.perf_counter()
        steps = generate_step(prefill, first_B1, greedy, tokens + 1)
        answer = np.concatenate([np.array(token_B1) for token_B1 in steps], axis=1)
        ms = 1000 * (time.perf_counter() - start)
        return answer.tolist(), ms / max(1, tokens)
