"""`auto` for a budget in milliseconds or GB: the method and the number of tokens that fit it."""

import logging
from collections.abc import Callable
from typing import Any

from ..hosts.auto import facts_of
from ..pruners.auto import AutoChoice, choose
from .budgets import BudgetChoice

logger = logging.getLogger("mlx_vlm_prune")
FIRST_SHARE = 0.25  # of the tokens, by which the first method is chosen
MOST_METHODS = 3  # each of them may be calibrated, some seconds


def first_method(model: Any, processor: Any, is_batched: bool = False) -> AutoChoice:
    """The method that is calibrated first. Whether it gains time the calibration says."""
    return choose(facts_of(model, processor, is_batched), FIRST_SHARE, None, is_timed=False)


def choose_within(
    model: Any, processor: Any, keep_within: Callable[[str], BudgetChoice]
) -> tuple[BudgetChoice, str]:
    """The choice of K by a method that is worth it at that K, and a line that says why.

    `keep_within` chooses K for a method. Where no method behind the tower meets the budget, one
    that shortens the tower is tried, if one is worth it. The line is logged where K meets it.
    """
    facts, method = facts_of(model, processor), first_method(model, processor)
    choice, tried = keep_within(method.pruner), {method.pruner}
    while not choice.reason and choice.K < choice.N and len(tried) < MOST_METHODS:
        better = choose(facts, choice.K / choice.N, None, is_timed=False)
        method = better if better.pruner == method.pruner else method
        if better.pruner in {*tried, "none"}:
            break
        method, choice = better, keep_within(better.pruner)
        tried.add(method.pruner)
    if choice.reason:
        inside = choose(facts, FIRST_SHARE, None, is_timed=False, in_tower=True)
        shorter = keep_within(inside.pruner) if inside.pruner != "none" else choice
        method, choice = (method, choice) if shorter.reason else (inside, shorter)
    line = _line(choice, method)
    if not choice.reason:
        logger.info(line)
    return choice, line


def _line(choice: BudgetChoice, method: AutoChoice) -> str:
    if choice.reason:
        return f"auto: none: {choice.reason}"
    if choice.K == choice.N:
        return f"auto: none: all {choice.N} visual tokens fit {choice.budget}"
    return method.line
