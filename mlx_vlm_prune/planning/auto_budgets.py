"""`auto` for a budget in milliseconds or GB: the method and the number of tokens that fit it."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..checkpoints.errors import UserError
from ..generation.request import Request
from ..generation.stream import pipeline_for
from ..hosts.auto import facts_of
from ..models.vlm import VLM
from ..pruners.auto import AutoChoice, ModelFacts, choose
from ..pruners.auto.choice import NONE
from .budgets import BudgetChoice, check_free_budget

logger = logging.getLogger("mlx_vlm_prune")
FIRST_SHARE = 0.25  # of the tokens, by which the first method is chosen
MOST_METHODS = 3  # after the tower, each of which may be calibrated, seconds to minutes


def first_method(model: Any, processor: Any, is_batched: bool = False) -> AutoChoice:
    """The method that is calibrated first. Whether it gains time the calibration says.

    Raises UserError where there is none.
    """
    return _first(facts_to_time(model, processor, is_batched))


def facts_to_time(
    model: Any, processor: Any, is_batched: bool = False, request: Request | None = None
) -> ModelFacts:
    """As `facts_of`; a model can do no method here that a calibration cannot be of."""
    facts = facts_of(model, processor, is_batched, request)

    def can(spec: str, share: float | None) -> bool:
        if not facts.can(spec, share):
            return False
        if not isinstance(model, VLM):
            return True
        try:
            check_free_budget(pipeline_for(model, spec), model.N)
        except UserError:
            return False
        return True

    return replace(facts, can=can)


def _first(facts: ModelFacts) -> AutoChoice:
    choice = choose(facts, FIRST_SHARE, None, is_timed=False)
    if choice.pruner == NONE:
        raise UserError(f"{choice.line}; a budget of time or memory needs a method: name one")
    return choice


def choose_within(
    model: Any, processor: Any, keep_within: Callable[[str], BudgetChoice],
    request: Request | None = None,
) -> tuple[BudgetChoice, str]:  # fmt: skip
    """The choice of K by a method that is worth it at that K, and a line that says why.

    `keep_within` chooses K for a method. Where no method after the tower meets the budget, one
    that shortens the tower is tried, if one is worth it. The line is logged where K meets it.
    Raises UserError where no method can be chosen.
    """
    facts = facts_to_time(model, processor, request=request)
    method = _first(facts)
    choice, tried = keep_within(method.pruner), {method.pruner}
    while not choice.reason and choice.K < choice.N and len(tried) < MOST_METHODS:
        better = choose(facts, choice.K / choice.N, None, is_timed=False)
        if better.pruner == method.pruner:
            method = better  # whose words are of this K
        if better.pruner in {*tried, NONE}:
            break
        tried.add(better.pruner)
        other = keep_within(better.pruner)
        if other.reason:
            break
        method, choice = better, other
    if choice.reason:
        inside = choose(facts, FIRST_SHARE, None, is_timed=False, in_tower=True)
        shorter = choice if inside.pruner in {*tried, NONE} else keep_within(inside.pruner)
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
