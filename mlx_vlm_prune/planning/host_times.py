"""What a warm request to a model of mlx-vlm's takes, for `advise`: with all tokens and with fewer.

Shapes: N visual tokens of the image, K kept.
"""

import time
from typing import Any

from ..generation.request import Request
from ..hosts.families import host_of
from ..hosts.families.pruner_defaults import plan_for_host
from ..hosts.host import Host, generation_stream
from ..hosts.prefill import HostPrefill
from ..hosts.prompt import encode_images, prune_prompt
from ..hosts.turns import RequestTurns
from ..pruners import plan
from .host_budgets import calibrate, predictor
from .host_calibration import HostCalibration, ImagesCalibration
from .host_runs import HostPrompt, open_prompt
from .times import BEHIND_TOWER, PROMPT, Measured, Times, time_of_token

QUARTER = 4


def measure(model: Any, processor: Any, image: Any) -> Measured:
    """Calibrate, or take the saved calibration, and predict the times with a quarter of the tokens.

    The method works behind the tower. A smaller image is one of those that were run.
    """
    host = host_of(model, processor)
    request, pipeline = Request(PROMPT, [image]), plan_for_host(host, BEHIND_TOWER)
    prompt = open_prompt(host, pipeline, request)
    calibration = calibrate(prompt)
    start = time.perf_counter()
    prompt = open_prompt(host, pipeline, request)
    image_ms = 1000 * (time.perf_counter() - start)
    (N,), text, predicted = prompt.tokens, prompt.text, predictor(prompt, calibration)
    K = min([k for k in prompt.feasible if k >= N // QUARTER], default=prompt.feasible[-1])
    full_ms, pruned_ms = (predicted.ms(k, text, 1) for k in (N, K))
    first = {"behind": image_ms + sum(map(float, pruned_ms.values()))}
    if smaller := smaller_image(calibration, N):
        of_smaller = ImagesCalibration(calibration, (smaller,), host.full_rows(smaller, 1))
        first["smaller"] = image_ms + sum(map(float, of_smaller.ms(smaller, text, 1).values()))
    vision_ms, prefill_ms = float(full_ms["vision"]), float(full_ms["prefill"])
    times = Times(image_ms, vision_ms, prefill_ms, token_ms(prompt), first)
    full_bytes, pruned_bytes = (
        round(calibration.row_bytes * float(predicted.rows(k, text, 1))) for k in (N, K)
    )
    return Measured(N, K, times, (full_bytes, pruned_bytes), methods_inside_tower(host))


def methods_inside_tower(host: Host) -> str:
    """Whether methods work there in this family, to follow the words "Inside the tower"."""
    if host.why_no_encoder_methods:
        return "no method works in this model"
    return "methods work too (tome, patch_norm, …), which only `sweep` times in mlx-vlm's models"


def smaller_image(calibration: HostCalibration, N: int) -> int | None:
    """The visual tokens of a picture that was run smaller and has about a quarter of N; None where
    a smaller one becomes as many."""
    fewer = [n for n in calibration.scaled if n < N]
    return min(fewer, key=lambda n: abs(n - N / QUARTER), default=None)


def token_ms(prompt: HostPrompt) -> float:
    """Milliseconds of one new token after the whole prompt."""
    host, inputs, none = prompt.host, prompt.inputs, plan("none")
    with RequestTurns(host).turn():
        with generation_stream():
            views = encode_images(host, inputs, none)
            sizes = [view.N for view in views]
            whole = prune_prompt(host, inputs, views, none, sizes, prompt.policy)
        return time_of_token(HostPrefill(host, whole))
