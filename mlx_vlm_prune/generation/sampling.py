"""Sampling and penalties by mlx-lm's own functions, where it is installed.

Temperature and top_p alone do without mlx-lm: what is here draws the same words from the same seed.

Shapes: V words.
"""

import functools
import sys
import threading
from collections.abc import Callable
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np

from ..checkpoints.errors import UserError, missing_package
from .request import LogitsProcessor, Request, Sampler

RANDOM = threading.Lock()  # MLX's random state is every thread's


class SeededSampler:
    """mlx-lm's or mlx-vlm's sampler with random numbers of its own.

    They are those that its command draws with the same seed, and MLX's own stay as they were. A
    sampler draws once a token; no state is read back from a GPU, which would wait for it.
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
        state: Any = mx.random.state
        with RANDOM:
            before = _seed_of(state[0])
            try:
                mx.random.seed(self.state)
                token_1 = self.sampler(logprobs_1V)
            finally:
                mx.random.seed(before)
        self.state = _seed_of(mx.random.split(mx.random.key(self.state), stream=mx.cpu))
        return token_1


def _seed_of(key: mx.array) -> int:
    """The seed of a key (2,), or of the first of several."""
    high, low = np.array(key).reshape(-1, 2)[0].tolist()
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
    """The caller's own sampler; else mlx-lm's, or where that is not installed and not needed ours;
    None where the likeliest word is taken."""
    if request.sampler or not request.temperature:
        return request.sampler
    if needs_sampler(request) or find_spec("mlx_lm"):
        return SeededSampler(_sample_utils("top_k").make_sampler, request)
    return SeededSampler(nucleus_sampler, request)


def nucleus_sampler(temp: float, top_p: float, **_: Any) -> Sampler:
    """In place of mlx-lm's `make_sampler`: draws from the smallest set of words that holds `top_p`
    of the probability, and equally likely ones with the last of it."""

    def sample(logprobs_1V: mx.array) -> mx.array:
        if 0 < top_p < 1:
            sorted_1V = mx.sort(logprobs_1V, axis=-1)
            p_1V = mx.exp(sorted_1V.astype(mx.float32))
            above_1V = mx.cumsum(p_1V, axis=-1, reverse=True, inclusive=False)
            whole_11 = above_1V[..., :1] + p_1V[..., :1]
            dropped_11 = (above_1V >= top_p * whole_11).sum(axis=-1, keepdims=True)
            least_11 = mx.take_along_axis(sorted_1V, dropped_11, axis=-1)
            logprobs_1V = mx.where(logprobs_1V < least_11, -mx.inf, logprobs_1V)
        return mx.random.categorical(logprobs_1V * (1 / temp))

    return sample


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
    """mlx-lm's functions. Raises UserError that says how to install them.

    Their file is loaded alone, since the package imports transformers, which takes seconds.
    """
    if loaded := sys.modules.get("mlx_lm.sample_utils"):
        return loaded
    package = find_spec("mlx_lm")
    if package is None or not package.origin:
        raise missing_package("mlx_lm", user)
    return _load_alone(Path(package.origin).with_name("sample_utils.py"))


@functools.cache
def _load_alone(file: Path) -> ModuleType:
    spec = spec_from_file_location("mlx_lm.sample_utils", file)
    assert spec and spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
