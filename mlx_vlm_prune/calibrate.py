"""A calibration: the model run, warm, with a handful of K, and timed as `generate` times it.

MLX_VLM_PRUNE_CALIBRATION_SECONDS sets about how long its timed runs may take in all: a number
above 0, 8 by default. A short calibration predicts with less certainty, and is kept as any other.

Shapes: N visual tokens of an image, K kept, V words.
"""

import itertools
import math
import os
import random
import sys
from collections.abc import Sequence
from typing import Any

from . import fast_blas

fast_blas.prepare()  # before the first import of mlx, or never

import mlx.core as mx  # noqa: E402
from tqdm import tqdm  # noqa: E402

from convert.errors import UserError  # noqa: E402

from .machine import machine, versions  # noqa: E402
from .model import VLM  # noqa: E402
from .operations import cache_bytes  # noqa: E402
from .predict import PARTS, Calibration, Place, Run  # noqa: E402
from .prompt import Prompt  # noqa: E402
from .pruners import Pipeline, Stage, downsample, plan  # noqa: E402
from .stream import WITHIN, Asked, Clock, Picker  # noqa: E402

SWITCH = "MLX_VLM_PRUNE_CALIBRATION_SECONDS"
# Runs at each place: as many as fit into the seconds, FEW to MANY; of a slow model what fits into
# PATIENCE times the seconds, but two.
SECONDS, PATIENCE, FEW, MANY = 8.0, 3.75, 4, 12
SHORT, LONG = 8, 128  # words; the long text is longer where the prompt is


def measure(model: VLM, pipeline: Pipeline, asked: Asked) -> Calibration:
    """Run the model with a handful of K on the pictures that were asked about.

    The places take turns, so that a machine that slows down does so for all of them.
    """
    places, limit = design(model, pipeline, asked), seconds()
    for _ in range(2):  # the first time is warm-up
        ends = [run(model, pipeline, asked, place) for place in (places[0], places[-1])]
    once = len(places) * sum(sum(end.ms.values()) for end in ends) / 2000
    few = max(2, min(FEW, int(PATIENCE * limit / once)))
    rounds = min(MANY, max(few, int(limit / once)))
    order = [p for n in range(rounds) for p in random.Random(n).sample(places, len(places))]
    bar = tqdm(order, desc=f"calibrating {pipeline.name}", unit="run", leave=False, file=sys.stderr)
    runs = tuple(run(model, pipeline, asked, place) for place in bar)
    text = model.config.text
    row = cache_bytes(text, [1] * text.num_hidden_layers, model.dtype.size)
    in_tower = bool(pipeline.at(Stage.IMAGE, Stage.ENCODER))
    return Calibration(pipeline.name, model.N, in_tower, row, runs, about(model))


def seconds() -> float:
    """How long the timed runs may take. Raises UserError where the environment has no such
    number."""
    value = os.environ.get(SWITCH) or str(SECONDS)
    try:
        limit = float(value)
    except ValueError:
        limit = math.nan
    if not 0 < limit < math.inf:
        raise UserError(f"{SWITCH} is {value!r}; it is a number of seconds above 0")
    return limit


def design(model: VLM, pipeline: Pipeline, asked: Asked) -> list[Place]:
    """Which (K, words, images) are run: from the least K to N, a long text too, and, where there
    are several images, all of them at once."""
    N, images, K_able = model.N, len(asked.visible), able(model, pipeline)
    quarter, half = nearest(K_able, N / 4), nearest(K_able, N / 2)
    long = max(LONG, 1 << (asked.text - 1).bit_length())
    told = [(K, SHORT, 1) for K in sorted({K_able[0], quarter, half, K_able[-1]})]
    if images > 1:
        told += [(quarter, SHORT, images), (N, SHORT, images), (N, long, images)]
    told += [(quarter, long, 1), (N, long, 1), (N, SHORT, 1)]
    return [Place(*one) for one in told]


def nearest(K_able: Sequence[int], aim: float) -> int:
    return min(K_able, key=lambda K: abs(K - aim))


def run(model: VLM, pipeline: Pipeline, asked: Asked, place: Place) -> Run:
    """One forward pass to the first token."""
    assert asked.pixels is not None
    row, pixels = words(model, place.text, place.images), asked.pixels[: place.images]
    mx.eval(pixels)
    pick, nbytes = Picker(0.0, 1.0, 0), dict.fromkeys(PARTS, 0.0)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    clock = Clock()

    def lap(name: str, value: Any = None) -> Any:
        told, part = clock.lap(name, value), WITHIN.get(name, name)
        nbytes[part] = max(nbytes[part], mx.get_peak_memory() - before)
        mx.reset_peak_memory()
        return told

    chosen = pipeline if place.K < model.N else plan("none")
    done = model([row], pixels, chosen, place.K, lap=lap)
    lap("prefill", pick(done.logits_BLV[:, -1]))
    return Run(place, {part: clock.ms[part] for part in PARTS}, nbytes)


def words(model: VLM, text: int, images: int) -> Prompt:
    """A prompt of so many words, the images among them."""
    config, N = model.config, model.N
    word = itertools.cycle(i for i in range(config.text.vocab_size) if i != config.image_token_id)
    ids: list[int] = []
    runs = []
    for _ in range(images):
        ids += itertools.islice(word, text // (images + 1))
        runs.append((len(ids), N))
        ids += [config.image_token_id] * N
    ids += itertools.islice(word, text - text // (images + 1) * images)
    return Prompt(ids, runs)


def able(model: VLM, pipeline: Pipeline) -> list[int]:
    """Every K below N that the methods can keep, ascending; of a smaller image, those that
    differ. Raises UserError where there is none."""
    N, step, layers = model.N, pipeline.decoder, model.config.text.num_hidden_layers
    if N == 1:
        raise UserError("an image is one visual token of this model, so nothing can be pruned")
    if len(pipeline.steps) == 1 and pipeline.at(Stage.IMAGE):
        return sorted({math.prod(downsample.smaller(model.grid, K)) for K in range(1, N)})
    if not step:
        return list(range(1, N))
    found, refused = [], None
    for K in range(1, N):
        n = pipeline.budgets(N, K)[-2] if len(pipeline.steps) > 1 else N
        try:
            step.ask(step.method.schedule, layers, n, K)
            found.append(K)
        except UserError as e:
            refused = e
    if refused and not found:
        raise refused
    return found


def about(model: VLM) -> dict[str, Any]:
    """What a calibration was made with; with anything else it says nothing."""
    threads = os.environ.get("OMP_NUM_THREADS")
    return {
        "machine": machine(),
        "device": mx.device_info().get("device_name"),
        "versions": versions(),
        "dtype": str(model.dtype),
        "threads": threads,
    }
