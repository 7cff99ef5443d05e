"""K for a request's `budget_ms`, by a calibration that is made before the first request.

The prediction is of a prompt that is read alone: a request that waits for others takes longer.
"""

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from ..generation.request import Request
from ..generation.running_batch import PreparedRequest
from ..generation.stream import PreparedPrompt, pipeline_for
from ..hosts.compatibility import check_pipeline
from ..hosts.families import host_of
from ..hosts.families.pruner_defaults import plan_for_host
from ..hosts.prepared_inputs import ProcessorOptions
from ..hosts.pruned_language import stock_language
from ..hosts.running_batch import PreparedPictures
from ..models.vlm import VLM
from ..planning.budgets import Budget, Workload, check_free_budget, choose, present_calibration
from ..planning.calibration import Calibration, synthetic_prompt
from ..planning.host_budgets import choose_for, measure_level
from ..planning.host_calibration import HostCalibration
from ..planning.host_runs import HostPrompt, measure, open_prompt, tokens_by_view
from ..pruners.budget import feasible_budgets
from .chat_request import ChatRequest
from .visual_budget import VisualBudget

NOT_CALIBRATED = (
    "budget_ms is possible with {} alone, and all visual tokens were kept: a server is calibrated"
    " at its start, for its --pruner with its --budget-ms"
)
BEYOND = (
    "the prompt has {} tokens of text and {} pictures, more or larger ones than the server was"
    " calibrated for: its visual tokens were chosen by extrapolation"
)
SAMPLE_WORDS, SAMPLE_PICTURES, SAMPLE_SIDE = 512, 2, 512
HOST_SIDE = 1024  # of a picture whose size decides on its tokens


class TimeBudgets:
    """Chooses the largest K whose prompt is read in time, for the method of `calibrate`."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor
        self.method: str | None = None
        self.calibration: tuple[Calibration, float] | None = None  # with the machine's level
        self.host_calibration: tuple[HostCalibration, float] | None = None

    def calibrate(self, method: str) -> None:
        """Time the model with a method; this takes seconds or minutes. Nothing is read or written
        on the disk.

        Raises UserError for a method that has no K to choose.
        """
        model = self.model
        if not isinstance(model, VLM):
            self._calibrate_host(method)
            return
        pipeline = pipeline_for(model, method)
        check_free_budget(pipeline, model.N)
        elsewhere = replace(self.processor, folder=None)
        self.calibration = present_calibration(model, elsewhere, pipeline, self._sample())
        self.method = pipeline.spec

    def _calibrate_host(self, method: str) -> None:
        """The same of a model of mlx-vlm's, with a picture as large as most."""
        host = host_of(self.model, self.processor)
        pipeline = plan_for_host(host, method)
        pictures = [_noise(HOST_SIDE)] * SAMPLE_PICTURES
        request = Request(" ".join(["a"] * SAMPLE_WORDS), pictures, method)
        with stock_language(self.model.language_model):
            prompt = open_prompt(host, pipeline, request)
            check_free_budget(pipeline, max(prompt.tokens))
            calibration = measure(prompt)
            self.host_calibration = calibration, measure_level(prompt, calibration)
        self.method = pipeline.spec

    def _sample(self) -> PreparedPrompt:
        """A request that has about as much of everything as most."""
        visible = self.processor.image.visible(_noise(SAMPLE_SIDE))
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
            return self._choose_for_host(chat, prepared)
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

    def _choose_for_host(self, chat: ChatRequest, prepared: PreparedRequest) -> VisualBudget:
        host = host_of(self.model, self.processor)
        pipeline = plan_for_host(host, chat.budget.pruner)
        policy = check_pipeline(host, pipeline, prepared.request.positions)
        assert isinstance(prepared, PreparedPictures), "of a model of mlx-vlm's"
        views = tokens_by_view(host, prepared.inputs)
        prompt = HostPrompt(host, pipeline, policy, ProcessorOptions(), prepared.inputs, views)
        check_free_budget(pipeline, max(prompt.tokens))
        if self.host_calibration is None or self.method != pipeline.spec:
            chat.notes.warn(NOT_CALIBRATED.format(self.method or "no method"), "budget_ms")
            return VisualBudget()
        calibration, level = self.host_calibration
        if not calibration.covers(prompt.text, prompt.tokens):
            chat.notes.warn(BEYOND.format(prompt.text, len(views)), "budget_ms")
        budget, max_tokens = Budget(chat.budget.budget_ms), prepared.request.max_tokens
        choice = choose_for(prompt, calibration, budget, prepared.image_ms, max_tokens, level)
        if choice.reason:
            chat.notes.warn(choice.reason, "budget_ms")
        return VisualBudget(**choice.options)


def _noise(side: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)
