"""Budgets in milliseconds and GB for mlx-vlm's models: the largest K that meets one.

request = Request("What is this?", ["photo.jpg"], pruner="divprune")
choice = keep_within(model, processor, request, Budget(ms=300))
answer = generate(model, processor, "What is this?", "photo.jpg", **choice.options)

Shapes: N visual tokens of the largest image, K kept of each.
"""

import math
import time
from functools import partial
from typing import Any

import mlx.core as mx

from ..checkpoints.errors import UserError
from ..generation.request import Request
from ..hosts.families import host_of
from ..hosts.families.pruner_defaults import plan_for_host
from ..hosts.host import ADAPTERS
from ..machine.hardware import environment
from .budgets import (
    Budget,
    BudgetChoice,
    Workload,
    check_free_budget,
    choose,
    median_ms,
    of_present_level,
)
from .calibration import calibration_file, kept_or_measured
from .host_calibration import HostCalibration, ImagesCalibration, load_host_calibration
from .host_runs import HostPrompt, dtype_of, measure, open_prompt, run_once, timed_prompt

SMALLER_CACHE = ("kv_bits", "max_kv_size")  # options that a prediction of memory does not count


def keep_within(
    model: Any,
    processor: Any,
    request: Request,
    budget: Budget,
    calibration: HostCalibration | None = None,
) -> BudgetChoice:
    """The largest K that keeps the time to the first token within `budget.ms` (in 19 of 20 runs),
    and the memory's peak within `budget.gb` for an answer of up to `request.max_tokens`; N where no
    K does. An image that has fewer than K keeps all.

    Without `calibration` the saved one is used, or a new one, which takes seconds or minutes and
    shows progress. Raises UserError: no image, nothing to prune, a method that has no K to choose,
    a budget of memory beside an option that makes the cache smaller, or a calibration of other
    processor options.
    """
    for name in SMALLER_CACHE:
        if budget.gb is not None and name in request.given_host_options:
            raise UserError(
                f"gb is {budget.gb:g}; a budget of memory counts whole caches, so leave out {name}"
            )
    host = host_of(model, processor)
    pipeline = plan_for_host(host, request.pruner)
    prompt = open_prompt(host, pipeline, request)
    check_free_budget(pipeline, max(prompt.tokens))
    if calibration:
        level = measure_level(prompt, calibration)
        if level == math.inf:
            raise UserError(
                "the calibration is of other processor options: one of its pictures becomes another"
                " number of visual tokens here; leave it out, or calibrate again"
            )
    else:
        calibration, level = present_calibration(prompt)
    start = time.perf_counter()  # once more: warm, as the answer will be
    prompt = open_prompt(host, pipeline, request)
    image_ms = 1000 * (time.perf_counter() - start)
    return choose_for(prompt, calibration, budget, image_ms, request.max_tokens, level)


def choose_for(
    prompt: HostPrompt, calibration: HostCalibration, budget: Budget, image_ms: float,
    max_tokens: int, level: float,
) -> BudgetChoice:  # fmt: skip
    """The choice for a prompt that was opened in `image_ms`."""
    held_bytes, images = mx.get_active_memory(), len(prompt.tokens)
    workload = Workload(prompt.text, images, image_ms, held_bytes, max_tokens, level)
    return choose(predictor(prompt, calibration), budget, workload, prompt.feasible)


def predictor(prompt: HostPrompt, calibration: HostCalibration) -> ImagesCalibration:
    """The calibration for a prompt's images."""
    return ImagesCalibration(calibration, prompt.tokens, prompt.full_rows)


def present_calibration(prompt: HostPrompt) -> tuple[HostCalibration, float]:
    """The calibration of this model and the machine's level; a new one if the level is far off."""
    return of_present_level(partial(calibrate, prompt), partial(measure_level, prompt))


def calibrate(prompt: HostPrompt, force: bool = False) -> HostCalibration:
    """The calibration for a prompt: from this process, from the cache folder, or a new one."""
    host, dtype = prompt.host, dtype_of(prompt.host)
    folder = getattr(host.model, "model_path", None)
    kind = [host.kind, prompt.pipeline.spec, str(dtype), str(mx.default_device())]
    kind.append(repr(prompt.options))
    if prompt.cache_options:
        kind.append(repr(sorted(prompt.cache_options.items())))
    if adapter := getattr(host.model, ADAPTERS, None):
        kind.append(f"adapters {adapter}")
    path = calibration_file(folder, *kind)
    return kept_or_measured(
        path,
        force,
        lambda path: load_host_calibration(path, environment(dtype)),
        lambda kept: kept.covers(prompt.text, prompt.tokens),
        lambda older: measure(prompt, older),
    )


def measure_level(prompt: HostPrompt, calibration: HostCalibration) -> float:
    """The time of a run now, as a multiple of its time in the calibration, with the picture that is
    nearest to the prompt's largest image; infinite where it has another number of visual tokens
    now."""
    largest = max(prompt.tokens)
    width, height, N = min(calibration.pictures, key=lambda picture: abs(picture[2] - largest))
    timed = timed_prompt(prompt, (width, height))
    if timed.N != N:
        return math.inf
    K, text, images = calibration.sizes[N].typical_setting
    ms = median_ms(partial(run_once, prompt, timed, K))
    return ms / sum(calibration.sizes[N].ms(K, text, images).values())
