"""K for a request's `budget_ms`, by the calibration of this machine.

The prediction is of a prompt that is read alone: a request that waits for others takes longer.
"""

from typing import Any

import mlx.core as mx

from ..generation.conversation import Conversation
from ..generation.stream import PreparedPrompt, pipeline_for
from ..machine.clock import request_clock
from ..models.vlm import VLM
from ..planning.budgets import Budget, Workload, check_free_budget, choose, present_calibration
from ..planning.calibration import Calibration
from ..pruners import Pipeline
from ..pruners.budget import feasible_budgets
from .chat_request import ChatRequest
from .visual_budget import VisualBudget

OURS_ALONE = (
    "budget_ms is not possible with mlx-vlm's models, and all visual tokens were kept; give"
    " visual_tokens"
)


class TimeBudgets:
    """Chooses the largest K whose prompt is read in time. The first request by a method takes some
    seconds more, where this machine was not calibrated for it."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor
        self.calibrations: dict[str, tuple[Calibration, float]] = {}  # each with the level

    def choose(self, chat: ChatRequest) -> VisualBudget:
        """The request's budget with K in place of milliseconds; a warning where no K meets it.

        Raises RequestRefusedError for a strict request, and UserError for a method that has no K
        to choose.
        """
        budget, request, model = chat.budget, chat.request, self.model
        if not request.images:
            return VisualBudget()
        if not isinstance(model, VLM):
            chat.notes.warn(OURS_ALONE, "budget_ms")
            return VisualBudget()
        pipeline, clock = pipeline_for(model, budget.pruner), request_clock()
        check_free_budget(pipeline, model.N)
        pictures, prompt = Conversation(model, self.processor).open(request, clock)
        pixels_IHW3 = mx.concatenate([picture.pixels_1HW3 for picture in pictures])
        inputs = PreparedPrompt(prompt, [picture.visible for picture in pictures], pixels_IHW3)
        calibration, level = self.calibration(pipeline, inputs)
        workload = Workload(
            inputs.text_tokens, len(pictures), clock.ms["image"], mx.get_active_memory(),
            request.max_tokens, level,
        )  # fmt: skip
        feasible = feasible_budgets(pipeline, model.grid, model.config.text.num_hidden_layers)
        choice = choose(calibration, Budget(budget.budget_ms), workload, feasible)
        if choice.reason:
            chat.notes.warn(choice.reason, "budget_ms")
        return VisualBudget(**choice.options)

    def calibration(self, pipeline: Pipeline, inputs: PreparedPrompt) -> tuple[Calibration, float]:
        """That of a method, and the machine's level when a request first named it."""
        known, images = self.calibrations.get(pipeline.spec), len(inputs.visible)
        if not known or not known[0].covers(inputs.text_tokens, images):
            known = present_calibration(self.model, self.processor, pipeline, inputs)
            self.calibrations[pipeline.spec] = known
        return known
