"""The method of a request that leaves it to `auto`."""

from dataclasses import replace
from typing import Any

from ..hosts.auto import facts_of
from ..inputs.budget import LOW_DETAIL_TOKENS
from ..planning.auto_budgets import first_method
from ..pruners import AUTO
from ..pruners.auto import choose, choose_for_clip
from .chat_request import ChatRequest
from .time_budget import TimeBudgets
from .visual_budget import VisualBudget


class AutoMethods:
    """Chooses for a model; with `has_caution` by what a question asks for, too.

    A budget of time gets the one method that the server was calibrated for.
    """

    def __init__(
        self, model: Any, processor: Any, times: TimeBudgets, has_caution: bool = True
    ) -> None:
        self.model, self.processor, self.times = model, processor, times
        self.has_caution = has_caution

    def calibrated_method(self, method: str) -> str:
        """The method that a server is calibrated for, which `method` names or leaves open."""
        if method != AUTO:
            return method
        return first_method(self.model, self.processor, is_batched=True).pruner

    def of_request(self, chat: ChatRequest) -> tuple[VisualBudget, str | None]:
        """The budget with a method in it, and why that one where it was chosen.

        Raises UserError.
        """
        budget = chat.budget
        if budget.pruner != AUTO:
            return budget, None
        if chat.request.video is not None:
            choice = choose_for_clip(budget.keep_ratio, budget.keep_tokens)
            return VisualBudget(**choice.options), choice.line
        if not chat.request.images:
            return VisualBudget(), None
        if budget.budget_ms is not None:
            method = self.times.method
            line = f"auto: {method}: calibrated for budget_ms" if method else None
            return replace(budget, pruner=method or self.calibrated_method(AUTO)), line
        tokens = LOW_DETAIL_TOKENS if budget.low_detail else budget.keep_tokens
        prompt = chat.request.prompt if self.has_caution and not budget.low_detail else None
        pictures: Any = chat.request.images  # which are open
        facts = facts_of(self.model, self.processor, is_batched=True)
        choice = choose(facts, budget.keep_ratio, tokens, prompt, lambda: pictures)
        if budget.low_detail and choice.pruner != "none":
            return replace(budget, pruner=choice.pruner), choice.line
        return VisualBudget(choice.pruner, choice.keep_ratio, choice.keep_tokens), choice.line
