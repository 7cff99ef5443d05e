"""Budgets in milliseconds and GB: the largest K that meets one, from a calibration.

choice = keep_within(model, processor, "What is this?", "photo.jpg", pruner="divprune", ms=300)
answer = generate(model, processor, "What is this?", "photo.jpg", **choice.options)
print(choice.outcome(answer))

Shapes: N visual tokens of an image, K kept.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from statistics import median
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from ..checkpoints.errors import UserError
from ..generation.request import list_images
from ..generation.result import GenerationResult
from ..generation.stream import PreparedPrompt, pipeline_for, prepare_prompt
from ..inputs.budget import FixedBudgetError
from ..inputs.image import MAX_PIXELS
from ..inputs.image_sources import ImageSource
from ..inputs.processor import Processor
from ..models.cache import STEP
from ..models.vlm import VLM
from ..pruners import Pipeline, Pruner
from ..pruners.budget import feasible_budgets
from .calibration import LEVEL_RUNS, Calibration, CalibrationT, calibrate, run_once
from .prediction import Run

LEVEL_SECONDS = 2.0  # the most that measuring the level takes
SAME_MACHINE = 2.0  # a machine that is faster or slower by a larger factor is another one
MEMORY_SLACK = 1.01  # memory hardly varies


@dataclass(frozen=True)
class Budget:
    """Milliseconds to the first token, GB (10^9 bytes) at the peak of an answer, or both."""

    ms: float | None = None
    gb: float | None = None

    def __post_init__(self) -> None:
        for option, value in (("ms", self.ms), ("gb", self.gb)):
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{option} is {value}; it must be a number above 0")
        if self.ms is None and self.gb is None:
            raise UserError("give ms, gb, or both")

    def allows(self, ms: float, gb: float) -> bool:
        return (self.ms is None or ms <= self.ms) and (self.gb is None or gb <= self.gb)

    def __str__(self) -> str:
        limits = ((self.ms, "ms"), (self.gb, "GB"))
        return " and ".join(f"{limit:g} {unit}" for limit, unit in limits if limit is not None)


class Predictor(Protocol):
    """What a choice needs of a calibration, for images of N visual tokens at most.

    K is a number or an array; `text` and `images` are the workload's.
    """

    @property
    def pruner(self) -> str: ...

    @property
    def N(self) -> int: ...

    @property
    def row_bytes(self) -> float: ...

    @property
    def slack(self) -> float: ...

    @property
    def in_tower(self) -> bool: ...

    @property
    def alternatives(self) -> str: ...

    def ms(self, K: Any, text: Any, images: Any) -> dict[str, Any]: ...

    def nbytes(self, K: Any, text: Any, images: Any) -> dict[str, Any]: ...

    def rows(self, K: Any, text: Any, images: Any) -> Any: ...


@dataclass(frozen=True)
class Workload:
    """What is known of an answer before K is chosen."""

    text: int  # tokens
    images: int
    image_ms: float  # to open the images
    held_bytes: int  # of weights and pixels
    max_tokens: int  # of the answer
    level: float = 1.0  # a run's time now, as a multiple of its time in the calibration


@dataclass(frozen=True)
class Forecast:
    """A prediction for one K."""

    ms: float  # to the first token, the median
    ms_most: float  # not exceeded by 19 of 20 runs
    gb: float  # peak memory


@dataclass(frozen=True)
class BudgetChoice:
    """K of N visual tokens of each image, and the prediction for it. Where images differ, N is the
    largest's, and one that has fewer than K keeps all.

    Where no K meets the budget, K is N (nothing is pruned) and `reason` is a sentence.
    """

    budget: Budget
    workload: Workload
    pruner: str
    K: int
    N: int
    expected: Forecast
    reason: str = ""
    calibration: Predictor | None = field(default=None, repr=False, compare=False)

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `generate`."""
        return {"pruner": "none" if self.K == self.N else self.pruner, "keep_tokens": self.K}

    def __str__(self) -> str:
        """The prediction, in a line."""
        parts, expected = [f"{self.K} of {self.N} visual tokens"], self.expected
        if self.budget.ms is not None:
            parts.append(f"predicted median {expected.ms:.0f} ms")
            parts.append(f"at most {expected.ms_most:.0f} ms in 19 of 20 runs")
        if self.budget.gb is not None:
            parts.append(f"predicted peak {expected.gb:.3f} GB")
        return f"Budget: {self.budget} -> {', '.join(parts)}"

    def outcome(self, answer: GenerationResult) -> str:
        """What the answer took beside its prediction, in a line."""
        figures = (
            (self.budget.ms, answer.ttft_ms["total"], self.expected.ms, 0, "ms", "median"),
            (self.budget.gb, answer.peak_memory, self.expected.gb, 3, "GB", "peak"),
        )
        parts = [
            f"{measured:.{digits}f} {unit} of {limit:g} {unit}"
            f" (predicted {statistic} {expected:.{digits}f} {unit},"
            f" {100 * abs(measured / expected - 1):.1f} % off)"
            for limit, measured, expected, digits, unit, statistic in figures
            if limit is not None
        ]
        return f"Budget {'met' if self.is_met(answer) else 'missed'}: {', '.join(parts)}"

    def is_met(self, answer: GenerationResult) -> bool:
        return self.budget.allows(answer.ttft_ms["total"], answer.peak_memory)

    def as_json(self, answer: GenerationResult) -> dict[str, Any]:
        """The budget, the prediction and the outcome."""
        ms, gb = answer.ttft_ms["total"], answer.peak_memory
        return {
            "wish": asdict(self.budget),
            "pruner": self.pruner,
            "tokens": self.K,
            "of": self.N,
            "predicted": asdict(self.expected),
            "level": self.workload.level,
            "why_not": self.reason or None,
            "took": {"ms": ms, "gb": gb},
            "off": {"ms": ms / self.expected.ms - 1, "gb": gb / self.expected.gb - 1},
            "met": self.is_met(answer),
        }


def keep_within(
    model: VLM,
    processor: Processor,
    prompt: str,
    image: ImageSource | Sequence[ImageSource],
    *,
    pruner: str | Pruner | Pipeline,
    ms: float | None = None, gb: float | None = None,
    max_tokens: int = 256,
    chat_template_config: Mapping[str, Any] | None = None,
    system: str | None = None,
    max_pixels: int = MAX_PIXELS,
    calibration: Calibration | None = None,
) -> BudgetChoice:  # fmt: skip
    """The largest K that keeps the time to the first token within `ms` (in 19 of 20 runs), and
    the memory's peak within `gb` for an answer of up to `max_tokens`; N where no K does.

    Without `calibration` the saved one is used, or a new one, which takes seconds or minutes and
    shows progress. Raises UserError: no budget, nothing to prune, or a method that has no K to
    choose.
    """
    budget, pipeline = Budget(ms, gb), pipeline_for(model, pruner)
    check_free_budget(pipeline, model.N)
    options = list_images(image), chat_template_config, system, max_pixels
    inputs = prepare_prompt(model, processor, prompt, *options)
    if inputs.pixels is None:
        raise UserError("a budget needs an image; without one there is nothing to prune")
    if calibration:
        level = measure_level(model, pipeline, inputs, calibration)
    else:
        calibration, level = present_calibration(model, processor, pipeline, inputs)
    start = time.perf_counter()  # once more: warm, as the answer will be
    inputs = prepare_prompt(model, processor, prompt, *options)
    mx.eval(inputs.pixels)
    image_ms, held_bytes = 1000 * (time.perf_counter() - start), mx.get_active_memory()
    text, count = inputs.text_tokens, len(inputs.visible)
    workload = Workload(text, count, image_ms, held_bytes, max_tokens, level)
    feasible = feasible_budgets(pipeline, model.grid, model.config.text.num_hidden_layers)
    return choose(calibration, budget, workload, feasible)


def present_calibration(
    model: VLM, processor: Processor, pipeline: Pipeline, inputs: PreparedPrompt
) -> tuple[Calibration, float]:
    """The calibration of this model and the machine's level; a new one if the level is far off."""
    return of_present_level(
        partial(calibrate, model, processor.folder, pipeline, inputs),
        partial(measure_level, model, pipeline, inputs),
    )


def of_present_level(
    calibrate: Callable[[bool], CalibrationT], measure_level: Callable[[CalibrationT], float]
) -> tuple[CalibrationT, float]:
    """A calibration and the machine's level; a new one if the level is far off."""
    calibration = calibrate(False)
    level = measure_level(calibration)
    if not 1 / SAME_MACHINE < level < SAME_MACHINE:
        calibration = calibrate(True)
        level = measure_level(calibration)
    return calibration, level


def measure_level(
    model: VLM, pipeline: Pipeline, inputs: PreparedPrompt, calibration: Calibration
) -> float:
    """The time of a run now, as a multiple of its time in the calibration."""
    setting = calibration.typical_setting
    ms = median_ms(partial(run_once, model, pipeline, inputs, setting))
    return ms / sum(calibration.ms(*setting).values())


def median_ms(run: Callable[[], Run]) -> float:
    """The median of a few runs' times, behind one that warms up."""
    run()
    start, ms = time.perf_counter(), list[float]()
    while not ms or (len(ms) < LEVEL_RUNS and time.perf_counter() - start < LEVEL_SECONDS):
        ms.append(sum(run().ms.values()))
    return median(ms)


def check_free_budget(pipeline: Pipeline, N: int) -> None:
    """Raises UserError for a method that has no K of N tokens to choose."""
    name = pipeline.spec
    if name == "none":
        raise UserError("a budget needs a pruner other than none, for example avgpool")
    if pipeline.trained_tokens:
        raise FixedBudgetError(
            f"{name} was trained for {pipeline.trained_tokens} visual tokens and keeps no other"
            " number, so it cannot follow a budget of time or memory"
        )
    if any(step.has_dynamic_budget for step in pipeline.steps):
        raise UserError(
            f"{name} gives each image a number of its own; leave out dynamic and budget=similarity"
        )
    if pipeline.own_budget(N) is not None:
        raise FixedBudgetError(f"{name} says itself how many visual tokens stay: leave that out")


def choose(
    calibration: Predictor, budget: Budget, workload: Workload, feasible: Iterable[int]
) -> BudgetChoice:
    """The largest K within the budget: N, or one of the feasible ones."""
    N, below_N = calibration.N, sorted(set(feasible), reverse=True)
    forecasts = dict(zip((N, *below_N), forecast(calibration, workload, N, *below_N), strict=True))
    choice = partial(BudgetChoice, budget, workload, calibration.pruner, calibration=calibration)
    for K, expected in forecasts.items():
        if budget.allows(expected.ms_most, expected.gb):
            return choice(K, N, expected)
    reason = explain(calibration, budget, workload, below_N[-1])
    return choice(N, N, forecasts[N], reason)


def forecast(calibration: Predictor, workload: Workload, *K: int) -> list[Forecast]:
    """A prediction for each K, the tokens kept of every image."""
    setting = np.array(K), workload.text, workload.images
    ms = workload.image_ms + workload.level * sum(calibration.ms(*setting).values())
    rows = calibration.rows(*setting) + workload.max_tokens
    cache = calibration.row_bytes * np.ceil(rows / STEP) * STEP  # which an answer fills
    peak = np.max([cache, *calibration.nbytes(*setting).values()], axis=0)
    gb = (workload.held_bytes + MEMORY_SLACK * peak) / 1e9
    figures = np.stack([ms, ms * calibration.slack, gb], axis=1)
    return [Forecast(*row) for row in figures.tolist()]


def explain(calibration: Predictor, budget: Budget, workload: Workload, least: int) -> str:
    """Why no K meets the budget: what pruning cannot reduce, or what the least K still takes."""
    (expected,) = forecast(calibration, workload, least)
    tower_ms = calibration.ms(least, workload.text, workload.images)["vision"]
    fixed_ms, held_gb = workload.image_ms + workload.level * tower_ms, workload.held_bytes / 1e9
    takes = f"with {least} visual token{'s' * (least != 1)} it takes"
    if budget.ms is not None and expected.ms_most > budget.ms:
        reason = f"{takes} up to {expected.ms_most:.0f} ms in 19 of 20 runs"
        if fixed_ms > budget.ms and not calibration.in_tower:
            reason = f"opening the image and the vision tower alone take {fixed_ms:.0f} ms"
        reason += f"; {calibration.alternatives}" if calibration.alternatives else ""
    elif budget.gb is not None and held_gb > budget.gb:
        reason = f"the weights alone take {held_gb:.3f} GB"
    else:
        reason = f"{takes} {expected.gb:.3f} GB"
    return f"pruning with {calibration.pruner} cannot meet {budget}, so nothing is pruned: {reason}"
