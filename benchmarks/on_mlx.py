"""A request on MLX, timed part by part, on whatever device is MLX's default."""

import time
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_vlm_prune.checkpoints.config import VLMConfig
from mlx_vlm_prune.image import open_image
from mlx_vlm_prune.loading import DTYPES
from mlx_vlm_prune.model import VLM, Prefill
from mlx_vlm_prune.pruners import METHODS, Pipeline
from mlx_vlm_prune.stream import Clock

from .shapes import Request
from .timing import PARTS, Run

NAME = "mlx"


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
        made = {name: METHODS[name].make(dims, K) for name in scorers}
        return {**made, "twig": METHODS["twig"].make(text, 1)}

    def run(self, asked: Request, pipeline: Pipeline, K: int, tokens: int) -> Run:
        """From the images' files to the first token, then so many more."""
        mx.reset_peak_memory()
        clock, ms = Clock(), dict.fromkeys(PARTS, 0.0)

        def lap(name: str, value: Any = None) -> Any:
            began = clock.last
            told = clock.lap(name, value)
            ms[name] += 1000 * (clock.last - began)
            return told

        values = [asked.preprocessor(open_image(file)) for file in asked.files]
        pixels = lap("image", mx.array(np.stack(values)).astype(self.model.dtype))
        before = self.model(asked.rows, pixels, pipeline, K, lap=lap)
        first_B1 = lap("prefill", mx.argmax(before.logits_BLV[:, -1], axis=-1, keepdims=True))
        held = sum(layer.nbytes for layer in before.cache)
        said, token_ms = self.say(before, first_B1, tokens)
        return Run(ms, token_ms, held, mx.get_peak_memory(), said)

    def say(
        self, before: Prefill, token_B1: mx.array, tokens: int
    ) -> tuple[list[list[int]], float]:
        """So many more tokens, whatever they are, and the milliseconds of each on average.

        As in `stream_generate`, the next is being computed while one is handed over.
        """
        said, place_B1 = [], before.next_B1
        began = time.perf_counter()
        for _ in range(tokens):
            logits_BLV = self.model.step(token_B1, place_B1, before)
            coming_B1 = mx.argmax(logits_BLV[:, -1], axis=-1, keepdims=True)
            mx.async_eval(coming_B1)
            said.append(np.array(token_B1))
            token_B1, place_B1 = coming_B1, place_B1 + 1
        said.append(np.array(token_B1))
        took = 1000 * (time.perf_counter() - began)
        return np.concatenate(said, axis=1).tolist(), took / max(1, tokens)
