"""Threads that compute with MLX, and what MLX asks of them at their end."""

import functools
from collections.abc import Callable
from typing import Any

import mlx.core as mx


def computing(run: Callable[..., None]) -> Callable[..., None]:
    """A thread's function, behind which the streams are cleared that MLX made in the thread.

    Every thread that has computed must do so (github.com/ml-explore/mlx/pull/4373): what MLX clears
    by itself while the process ends may abort it, behind the last answer.
    """

    @functools.wraps(run)
    def run_and_clear(*arguments: Any) -> None:
        try:
            run(*arguments)
        finally:
            if clear := getattr(mx, "clear_streams", None):  # MLX 0.31 may not have it
                clear()

    return run_and_clear
