"""What a warm request to a model of ours takes, for `advise`: with all tokens and with fewer.

Shapes: B prompts (1 here), N visual tokens of the image, K kept.
"""

import time
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..generation.prefill import Prefill
from ..generation.steps import generate_step, greedy
from ..generation.stream import PreparedPrompt, prepare_prompt
from ..inputs.processor import Processor
from ..models.vlm import VLM
from ..pruners import plan
from . import operations
from .calibration import calibrate

PROMPT, TIMED_TOKENS = "What is this?", 16
# The fastest method of each stage.
BEHIND_TOWER, INSIDE_TOWER, SMALLER_IMAGE = "random", "tome", "downsample"


@dataclass(frozen=True)
class Times:
    """Milliseconds of a warm request with all tokens, and predictions with a quarter of them.

    `first` is the predicted time to the first token with a quarter left "behind" the tower,
    "inside" it, or of a "smaller" image, where the model can have these. `token` is one new token.
    """

    image: float
    vision: float
    prefill: float
    token: float
    first: dict[str, float]

    @property
    def total(self) -> float:
        return self.image + self.vision + self.prefill

    @property
    def most_speedup(self) -> float:
        """The speedup of a method after the tower that keeps no token: the upper bound."""
        return self.total / (self.image + self.vision)


@dataclass(frozen=True)
class Measured:
    """The times of an image of so many tokens, of which so many are kept; bytes of the prompt's
    cache with all of them, and with those. `inside_tower` says what is known of methods there,
    where `times` has none."""

    tokens: int
    kept: int
    times: Times
    cache_bytes: tuple[int, int]
    inside_tower: str = ""


def measure(model: VLM, processor: Processor, image: Any) -> Measured:
    """Calibrate, or take the saved calibration, and predict the times with a quarter of the tokens.

    The tower's time inside it or with a smaller image is scaled by its operation count.
    """
    K = max(1, model.N // 4)
    prepared = prepare_prompt(model, processor, PROMPT, image)
    calibration = calibrate(model, processor.folder, plan(BEHIND_TOWER), prepared)
    N, text = model.N, prepared.text_tokens
    full_ms, pruned_ms = calibration.ms(N, text, 1), calibration.ms(K, text, 1)
    start = time.perf_counter()
    mx.eval(prepare_prompt(model, processor, PROMPT, image).pixels)
    image_ms = 1000 * (time.perf_counter() - start)

    def tower_ms(spec: str) -> float:
        full, pruned = (
            operations.count(model.config, text, plan(name), k).vision
            for name, k in (("none", N), (spec, K))
        )
        return full_ms["vision"] * pruned / full

    has_blocks = model.merge != (1, 1)  # of patches: none may leave inside the tower
    inside_ms = full_ms["vision"] if has_blocks else tower_ms(INSIDE_TOWER)
    first = {
        "behind": image_ms + sum(pruned_ms.values()),
        "inside": image_ms + inside_ms + pruned_ms["prefill"],
        "smaller": image_ms + tower_ms(SMALLER_IMAGE) + pruned_ms["prefill"],
    }
    times = Times(
        image_ms, full_ms["vision"], full_ms["prefill"], _token_ms(model, prepared), first
    )
    full_bytes, pruned_bytes = (
        operations.count(model.config, text, plan(name), k, itemsize=model.dtype.size).cache_bytes
        for name, k in (("none", N), (BEHIND_TOWER, K))
    )
    return Measured(N, K, times, (full_bytes, pruned_bytes))


def _token_ms(model: VLM, prepared: PreparedPrompt) -> float:
    return time_of_token(model([prepared.prompt], prepared.pixels, plan("none"), model.N))


def time_of_token(prefill: Prefill) -> float:
    """Milliseconds of one new token, the mean of TIMED_TOKENS after the prompt."""
    first_B1 = greedy(prefill.logits_BV)
    mx.eval(first_B1)
    start = time.perf_counter()
    for token_B1 in generate_step(prefill, first_B1, greedy, TIMED_TOKENS + 1):
        mx.eval(token_B1)
    return 1000 * (time.perf_counter() - start) / TIMED_TOKENS
