"""K for a request's `budget_ms`, by a calibration that is made before the first request.

The prediction is of a prompt that is read alone: a request that waits for others takes longer.
"""

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from ..generation.running_batch import PreparedRequest
from ..generation.stream import PreparedPrompt, pipeline_for
from ..models.vlm import VLM
from ..planning.budgets import Budget, Workload, check_free_budget, choose, present_calibration
from ..planning.calibration import Calibration, synthetic_prompt
from ..pruners.budget import feasible_budgets
from .chat_request import ChatRequest
from .visual_budget import VisualBudget

OURS_ALONE = (
    "budget_ms is not possible with mlx-vlm's models, and all visual tokens were kept; give"
    " visual_tokens"
)
NOT_CALIBRATED = (
    "budget_ms is possible with {} alone, and all visual tokens were kept: a server is calibrated"
    " at its start, for its --pruner with its --budget-ms"
)
BEYOND = (
    "the prompt has {} tokens of text and {} pictures, more than the server was calibrated for: its"
    " visual tokens were chosen by extrapolation"
)
SAMPLE_WORDS, SAMPLE_PICTURES, SAMPLE_SIDE = 512, 2, 512


class TimeBudgets:
    """Chooses the largest K whose prompt is read in time, for the method of `calibrate`."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor
        self.method: str | None = None
        self.calibration: tuple[Calibration, float] | None = None  # with the machine's level

    def calibrate(self, method: str) -> None:
        """Time our models with a method, some seconds. Nothing is read or written on the disk.

        Raises UserError for a method that has no K to choose.
        """
        model = self.model
        if not isinstance(model, VLM):
            return
        pipeline = pipeline_for(model, method)
        check_free_budget(pipeline, model.N)
        elsewhere = replace(self.processor, folder=None)
        self.calibration = present_calibration(model, elsewhere, pipeline, self._sample())
        self.method = pipeline.spec

    def _sample(self) -> PreparedPrompt:
        """A request that has about as much of everything as most."""
        side, draw = SAMPLE_SIDE, np.random.default_rng(0)
        noise = Image.fromarray(draw.integers(0, 255, (side, side, 3), dtype=np.uint8))
        visible = self.processor.image.visible(noise)
        pixels = mx.array(np.stack([self.processor.image.values(visible)] * SAMPLE_PICTURES))
        prompt = synthetic_prompt(self.model, SAMPLE_WORDS, SAMPLE_PICTURES)
        pictures = [visible] * SAMPLE_PICTURES
        return PreparedPrompt(prompt, pictures, pixels.astype(self.model.dtype))

    def choose(self, chat: ChatRequest, prepared: PreparedRequest) -> VisualBudget:
        """The request's budget with K in place of milliseconds; a warning where no K meets it.

        Raises RequestRefusedError for a strict request, and UserError for a method that has no K
        to choose.
        """
        budget, request, model = chat.budget, prepared.request, self.model
        if not request.images:
            return VisualBudget()
        if not isinstance(model, VLM):
            chat.notes.warn(OURS_ALONE, "budget_ms")
            return VisualBudget()
        pipeline = pipeline_for(model, budget.pruner)
        check_free_budget(pipeline, model.N)
        if self.calibration is None or self.method != pipeline.spec:
            chat.notes.warn(NOT_CALIBRATED.format(self.method or "no method"), "budget_ms")
            return VisualBudget()
        (calibration, level), images = self.calibration, len(request.images)
        words = prepared.rows - images * model.N
        if not calibration.covers(words, images):
            chat.notes.warn(BEYOND.format(words, images), "budget_ms")
        held_bytes = mx.get_active_memory()
        workload = Workload(
            words, images, prepared.image_ms, held_bytes, request.max_tokens, level
        )  # fmt: skip
        feasible = feasible_budgets(pipeline, model.grid, model.config.text.num_hidden_layers)
        choice = choose(calibration, Budget(budget.budget_ms), workload, feasible)
        if choice.reason:
            chat.notes.warn(choice.reason, "budget_ms")
        return VisualBudget(**choice.options)
