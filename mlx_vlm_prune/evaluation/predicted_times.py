"""Times to the first token that are predicted for explored answers, beside those that they took.

Of our models from a calibration of this machine. Of mlx-vlm's from the operations of their language
model, at the speed that it has with all visual tokens; what the method itself takes is left out.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import mlx.core as mx

from ..checkpoints.errors import UserError
from ..generation.request import pixel_limit
from ..generation.result import GenerationResult
from ..generation.stream import prepare_prompt
from ..hosts.host import Host
from ..hosts.prompt import signal_layers
from ..inputs.processor import Processor
from ..machine.clock import timing_parts
from ..models.vlm import VLM
from ..planning.budgets import check_free_budget, present_calibration
from ..planning.calibration import Calibration
from ..pruners import Pipeline, Stage
from .budgeted_methods import BudgetedMethod
from .sweep_cases import SweptHost
from .sweep_run import Measurement

logger = logging.getLogger("mlx_vlm_prune")
Answer = Callable[..., GenerationResult]  # `generate` with the model, the prompt and the images
Milliseconds = dict[str, float]  # of each part up to the first token, and the total


class PredictedTimes(Protocol):
    """Predicts for the answers of one model to one prompt; None where it cannot. Raises UserError
    where what it needs cannot be measured."""

    about: str  # what the times are predicted from

    def of_answer(
        self, case: BudgetedMethod, full: GenerationResult, answer: GenerationResult
    ) -> Milliseconds | None: ...

    def of_full(self, pipeline: Pipeline) -> Milliseconds | None:
        """With all visual tokens, from what is known of a method."""
        ...


class CalibratedTimes:
    """For one of our models. A method is calibrated, and the machine's level measured, once."""

    about = "a calibration of this machine"

    def __init__(
        self, model: VLM, processor: Processor, prompt: str, images: Sequence[Any],
        options: Mapping[str, Any],
    ) -> None:  # fmt: skip
        self.model, self.processor = model, processor
        self.prompt, self.images, self.options = prompt, images, options
        self.calibrations: dict[str, tuple[Calibration, float]] = {}  # by method, with the level

    def of_answer(
        self, case: BudgetedMethod, full: GenerationResult, answer: GenerationResult
    ) -> Milliseconds | None:
        try:
            check_free_budget(case.pipeline, self.model.N)
        except UserError:
            return None
        return self._by_part(case.pipeline, int(case.K))

    def of_full(self, pipeline: Pipeline) -> Milliseconds | None:
        return self._by_part(pipeline, self.model.N)

    def _by_part(self, pipeline: Pipeline, K: int) -> Milliseconds:
        model, processor = self.model, self.processor
        start = time.perf_counter()
        config, system = (self.options.get(n) for n in ("chat_template_config", "system"))
        limit = pixel_limit(self.options.get("max_pixels"), None)
        inputs = prepare_prompt(model, processor, self.prompt, self.images, config, system, limit)
        mx.eval(inputs.pixels)
        image_ms = 1000 * (time.perf_counter() - start)
        if pipeline.spec not in self.calibrations:
            measured = present_calibration(model, processor, pipeline, inputs)
            self.calibrations[pipeline.spec] = measured
        calibration, level = self.calibrations[pipeline.spec]
        parts = calibration.ms(K, inputs.text_tokens, len(inputs.visible))
        return with_total(
            {"image": image_ms} | {name: level * float(part) for name, part in parts.items()}
        )


COUNTED = (
    "the operations of the language model, at the speed that it had with all visual tokens, without"
    " what the method itself takes"
)
NOT_COUNTED = "nothing: the operations of this model's layers are not counted"


class CountedTimes:
    """For a model of mlx-vlm's. `answer` is asked twice more with a share of 1, once to warm up,
    for each choice of the tower's signals; that times every part, also where parts are computed in
    one go."""

    def __init__(self, host: Host, answer: Answer) -> None:
        self.swept, self.answer = SweptHost(host), answer
        self.about = COUNTED if self.swept.sizes else NOT_COUNTED
        self.all_tokens: dict[Any, GenerationResult] = {}  # by signals and their layers

    def of_answer(
        self, case: BudgetedMethod, full: GenerationResult, answer: GenerationResult
    ) -> Milliseconds | None:
        if case.pipeline.at(Stage.IMAGE, Stage.ENCODER):
            return None  # the tower's operations are not counted
        if not self.swept.sizes:
            return None
        whole, pruned = (Measurement.of(each, 0.0) for each in (full, answer))
        counted = [self.swept.operations(case, whole, each) for each in (whole, pruned)]
        parts = {n: ms for n, ms in self._times_of_all(case).items() if n != "pruner"}
        assert counted[0] and counted[1], "there are sizes"
        share = counted[1]["prefill"] / counted[0]["prefill"]
        return with_total({**parts, "prefill": share * parts["prefill"]})

    def of_full(self, pipeline: Pipeline) -> Milliseconds | None:
        return None  # it is what the others are predicted from

    def _times_of_all(self, case: BudgetedMethod) -> dict[str, Any]:
        signals = tuple(sorted(signal_layers(self.swept.host, case.pipeline).items()))
        if signals not in self.all_tokens:
            with timing_parts():
                for _ in range(2):  # the first is warm-up
                    answer = self.answer(pruner=case.pipeline, keep_ratio=1.0, max_tokens=1)
            self.all_tokens[signals] = answer
        return {n: ms for n, ms in self.all_tokens[signals].ttft_ms.items() if n != "total"}


def predict_or_warn(
    pipeline: Pipeline, predict: Callable[[], Milliseconds | None]
) -> Milliseconds | None:
    """A prediction; None, with a warning, where it is refused: an answer needs none."""
    try:
        return predict()
    except UserError as problem:
        logger.warning("no time is predicted for %s: %s", pipeline.spec, problem)
        return None


def with_total(parts: Mapping[str, float]) -> Milliseconds:
    """Milliseconds of parts, and their sum."""
    return {**parts, "total": sum(parts.values())}
