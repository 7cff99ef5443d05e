"""Sampling and penalties by mlx-lm's own functions: top_k, min_p and repetition_penalty.

Shapes: V words.
"""

import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np

from ..checkpoints.errors import UserError, missing_package
from .request import LogitsProcessor, Request, Sampler

RANDOM = threading.Lock()  # MLX's random state is every thread's


class SeededSampler:
    """mlx-lm's or mlx-vlm's sampler with random numbers of its own.

    They are those that its command draws with the same seed, and MLX's own stay as they were.
    """

    def __init__(self, make_sampler: Callable[..., Sampler], request: Request) -> None:
        self.top_k, self.state = request.top_k, request.seed
        self.sampler = make_sampler(
            temp=request.temperature, top_p=request.top_p, min_p=request.min_p, top_k=self.top_k
        )

    def __call__(self, logprobs_1V: mx.array) -> mx.array:
        """A token id (1,). Raises UserError where the vocabulary has no more than `top_k` words."""
        if self.top_k >= logprobs_1V.shape[-1]:
            raise UserError(
                f"top_k is {self.top_k}; it must be below the vocabulary's {logprobs_1V.shape[-1]}"
            )
        with RANDOM:
            before = _random_state()
            try:
                mx.random.seed(self.state)
                token_1 = self.sampler(logprobs_1V)
                self.state = _random_state()
            finally:
                mx.random.seed(before)
        return token_1


def _random_state() -> int:
    """The seed that brings MLX's random numbers to where they are."""
    state: Any = mx.random.state
    high, low = np.array(state[0]).tolist()
    return int(high) << 32 | int(low)


def check_sampling(request: Request) -> None:
    """Raises UserError where a request needs mlx-lm, and it is not installed."""
    if needs_sampler(request):
        _sample_utils("top_k" if request.top_k else "min_p")
    if request.repetition_penalty:
        _sample_utils("repetition_penalty")


def needs_sampler(request: Request) -> bool:
    """Is a word drawn in a way that only mlx-lm's sampler has?"""
    return bool(request.temperature and not request.sampler and (request.top_k or request.min_p))


def request_sampler(request: Request) -> Sampler | None:
    """The caller's own sampler, or mlx-lm's where the request needs it."""
    if not needs_sampler(request):
        return request.sampler
    return SeededSampler(_sample_utils("top_k").make_sampler, request)


def request_processors(request: Request) -> list[LogitsProcessor]:
    """mlx-lm's penalty, where it is asked for, and then the caller's own processors."""
    processors = [*(request.logits_processors or ())]
    if request.repetition_penalty:
        processors = [*penalties(_sample_utils("repetition_penalty"), request), *processors]
    return processors


def penalties(sample_utils: ModuleType, request: Request) -> list[LogitsProcessor]:
    """The penalty for words that were said before, of mlx-lm's module or of mlx-vlm's."""
    processors: list[LogitsProcessor] = sample_utils.make_logits_processors(
        repetition_penalty=request.repetition_penalty,
        repetition_context_size=request.repetition_context_size,
    )
    return processors


def _sample_utils(user: str) -> ModuleType:
    """mlx-lm's functions. Raises UserError that says how to install them."""
    try:
        from mlx_lm import sample_utils
    except ModuleNotFoundError as problem:
        if problem.name != "mlx_lm":
            raise
        raise missing_package("mlx_lm", user) from None
    module: ModuleType = sample_utils
    return module
