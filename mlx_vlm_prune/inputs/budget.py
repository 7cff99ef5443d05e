"""How many tokens K of an image's N stay: by default half. Either framework's budgets are these."""

import functools
import logging
from numbers import Integral, Real
from typing import Protocol

from ..checkpoints.errors import UserError

logger = logging.getLogger("mlx_vlm_prune")
DEFAULT_KEEP_RATIO = 0.5  # of an image's visual tokens, without a budget, in every way in

LOW_DETAIL_TOKENS, LOW_DETAIL_PART = 64, 9


class FixedBudgetError(UserError):
    """A budget for a method that says itself how many tokens stay."""


class Chain(Protocol):
    """What a budget asks a chain of methods."""

    @property
    def spec(self) -> str: ...

    @property
    def trained_tokens(self) -> int | None: ...

    def own_budget(self, N: int) -> int | None: ...


def tokens_for(N: int, ratio: float) -> int:
    """A share of N tokens as a number: rounded down, at least one."""
    return max(1, int(N * ratio + 1e-9))  # 0.29 * 100 is less than 29


def low_detail_tokens(N: int) -> int:
    """What is kept of N tokens where a request says OpenAI's `detail: low`: 64, or a ninth of them
    if that is more."""
    return min(N, max(LOW_DETAIL_TOKENS, N // LOW_DETAIL_PART))


def check_budget(keep_ratio: float | None, keep_tokens: int | None) -> None:
    """Say early what is wrong with a budget, however many tokens an image has. Raises UserError."""
    if keep_ratio is not None and keep_tokens is not None:
        raise UserError("give keep_ratio or keep_tokens, not both")
    is_ratio = isinstance(keep_ratio, Real) and not isinstance(keep_ratio, bool)
    if keep_ratio is not None and not (is_ratio and 0 < keep_ratio <= 1):
        raise UserError(f"keep_ratio is {keep_ratio!r}; it must be above 0 and at most 1")
    is_count = isinstance(keep_tokens, Integral) and not isinstance(keep_tokens, bool)
    if keep_tokens is not None and not (is_count and keep_tokens >= 1):
        raise UserError(f"keep_tokens is {keep_tokens!r}; it must be a whole number, at least 1")


def check_training_budget(N: int, keep_tokens: int | None) -> None:
    """Raises UserError where all images have N tokens and no image could ever be pruned."""
    if keep_tokens is not None and keep_tokens > N:
        raise UserError(f"keep_tokens is {keep_tokens}; an image has 1 to {N} visual tokens")


def budget(N: int, keep_ratio: float | None, keep_tokens: int | None, pruner: Chain) -> int:
    """K of N tokens: at most `keep_tokens`, or a share of N; half without either.

    An image that has fewer than `keep_tokens` keeps all. Raises UserError.
    """
    check_budget(keep_ratio, keep_tokens)
    if (fixed := pruner.own_budget(N)) is not None:
        if (keep_ratio, keep_tokens) not in ((None, None), (1, None)):
            raise FixedBudgetError(
                f"{pruner.spec} says itself how many visual tokens stay ({fixed} of {N} in the"
                " average layer); leave out keep_ratio and keep_tokens"
            )
        return N if keep_ratio == 1 else fixed
    if keep_tokens is None and keep_ratio is None:
        if pruner.trained_tokens:
            return min(N, pruner.trained_tokens)
        keep_ratio = 1.0 if pruner.spec == "none" else default_keep_ratio(pruner.spec)
    K = tokens_for(N, keep_ratio) if keep_ratio is not None else min(N, keep_tokens or N)
    if pruner.spec == "none" and K != N:
        raise UserError(f"pruner none keeps all {N} visual tokens; choose another to keep {K}")
    if pruner.trained_tokens and K not in (N, pruner.trained_tokens):
        raise FixedBudgetError(
            f"this checkpoint's {pruner.spec} was trained for {pruner.trained_tokens} visual"
            f" tokens; it cannot keep {K}"
        )
    return K


@functools.cache
def default_keep_ratio(spec: str) -> float:
    """The share that a method keeps without a budget; it is logged once for each method."""
    logger.warning("%s has no budget and keeps keep_ratio=%g", spec, DEFAULT_KEEP_RATIO)
    return DEFAULT_KEEP_RATIO
