"""Budgets in milliseconds and GB: the largest K that meets one, from a calibration.

choice = keep_within(model, processor, "What is this?", "photo.jpg", pruner="divprune", ms=300)
answer = generate(model, processor, "What is this?", "photo.jpg", **choice.options)
print(choice.outcome(answer))

A calibration lies in the user's cache folder, for this model, pruner, dtype, device and versions.
A few runs before each choice tell how fast the machine is at present. A file that is damaged, old
or not writable costs the time of a new calibration, and nothing else.
"""

import hashlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx

from .calibrate import able, about, measure, run
from .checkpoints.errors import UserError
from .checkpoints.files import read_json
from .generation.stream import ImageSource, PreparedPrompt, prepare, resolve
from .loading import Processor
from .model import VLM
from .predict import BEFORE, PARTS, Calibration, Place, Run
from .pruners import Pipeline, Pruner
from .remembered import cache_folder, keep, model_key
from .wish import Choice, Request, Wish, choose

FORMAT = 1  # of the files
PROBE_SECONDS = 2.0
LIKE = 2.0  # a machine that is faster or slower by more than this is another one
BUSY = 1.5  # a slack not worth remembering

_held: dict[Path, Calibration] = {}  # those that this process made or read


def keep_within(
    model: VLM,
    processor: Processor,
    prompt: str,
    image: ImageSource | Sequence[ImageSource],
    *,
    pruner: str | Pruner | Pipeline,
    ms: float | None = None,
    gb: float | None = None,
    max_tokens: int = 256,
    template: Mapping[str, Any] | None = None,
    calibration: Calibration | None = None,
) -> Choice:
    """The largest K that keeps the time to the first token within `ms` (in 19 of 20 runs), and
    the memory's peak within `gb` for up to `max_tokens` of answer; N where no K does.

    Without `calibration` one is taken from the cache or made, which takes some seconds and shows
    progress. Raises UserError: no wish, nothing to prune, or a method that has no K to choose.
    """
    wish, pipeline = Wish(ms, gb), resolve(model, pruner)
    check(pipeline)
    asked = prepare(model, processor, prompt, image, template)
    if asked.pixels is None:
        raise UserError("a budget needs an --image; without one there is nothing to prune")
    known = calibration or calibrated(model, processor.folder, pipeline, asked)
    level = present(model, pipeline, asked, known)
    if not calibration and not 1 / LIKE < level < LIKE:
        known = calibrated(model, processor.folder, pipeline, asked, anew=True)
        level = present(model, pipeline, asked, known)
    began = time.perf_counter()  # once more: warm, as the answer will be
    asked = prepare(model, processor, prompt, image, template)
    mx.eval(asked.pixels)
    image_ms, held = 1000 * (time.perf_counter() - began), mx.get_active_memory()
    request = Request(asked.text, len(asked.visible), image_ms, held, max_tokens, level)
    return choose(known, wish, request, able(model, pipeline))


def check(pipeline: Pipeline) -> None:
    """Refuse what has no K to choose."""
    name = pipeline.name
    if name == "none":
        raise UserError("a budget needs a --pruner other than none, for example avgpool")
    if pipeline.trained_tokens:
        raise UserError(
            f"{name} was trained for {pipeline.trained_tokens} visual tokens and keeps no other"
            " number, so it cannot follow a budget of time or memory"
        )
    if any(step.has_dynamic_budget for step in pipeline.steps):
        raise UserError(f"{name} gives each image a number of its own; leave out dynamic")


def calibrated(
    model: VLM, folder: Path | None, pipeline: Pipeline, asked: PreparedPrompt, anew: bool = False
) -> Calibration:
    """The calibration for what is asked: of this process, of the cache folder, or a new one."""
    path, known = _path(model, folder, pipeline), None
    if path and not anew:
        known = _held.get(path) or read(path, about(model))
    if not known or not covers(known, asked):
        known = measure(model, pipeline, asked)
        if path and is_worth_keeping(known):
            _write(path, known)
    if path:
        _held[path] = known
    return known


def is_worth_keeping(known: Calibration) -> bool:
    """Not if the machine was busy with something else; that is said on stderr."""
    if known.slack > BUSY:
        print(
            f"note: while calibrating, runs took up to {known.slack:.1f} x as long as usual: the"
            " machine is busy, budgets are chosen with care, and the next run calibrates anew",
            file=sys.stderr,
        )
    return known.slack <= BUSY


def covers(known: Calibration, asked: PreparedPrompt) -> bool:
    """Was it made with as many words and images?"""
    return asked.text <= known.longest and len(asked.visible) <= known.most_images


def present(model: VLM, pipeline: Pipeline, asked: PreparedPrompt, known: Calibration) -> float:
    """How much longer a run takes now than when this was measured: a factor, of a few runs."""
    place = known.middle
    run(model, pipeline, asked, place)  # warm-up
    began, took = time.perf_counter(), list[float]()
    while not took or (len(took) < BEFORE and time.perf_counter() - began < PROBE_SECONDS):
        took.append(sum(run(model, pipeline, asked, place).ms.values()))
    return median(took) / sum(known.ms(*place).values())


def _path(model: VLM, folder: Path | None, pipeline: Pipeline) -> Path | None:
    """Where it lies; None for a model that lies nowhere."""
    if folder is None:
        return None
    try:
        key = model_key(folder)
    except UserError:
        return None
    told = json.dumps([pipeline.name, str(model.dtype), str(mx.default_device())])
    name = f"{key}-{hashlib.sha256(told.encode()).hexdigest()[:8]}.json"
    return cache_folder() / "calibrations" / name


def read(path: Path, expected: Mapping[str, Any]) -> Calibration | None:
    """The file's, if it is whole and of this machine and these versions."""
    try:
        told = read_json(path)
        if told["format"] != FORMAT or told["about"] != expected:
            return None
        runs = tuple(
            Run(
                Place(*(_whole(one[name]) for name in Place._fields)),
                {part: _number(one["ms"][part]) for part in PARTS},
                {part: _number(one["nbytes"][part]) for part in PARTS},
            )
            for one in told["runs"]
        )
        N, row = _whole(told["N"]), _whole(told["row_bytes"])
        known = Calibration(told["pruner"], N, bool(told["in_tower"]), row, runs, expected)
        for K in (1, N):  # fails where runs are missing
            known.slack, known.ms(K, 1, 1), known.nbytes(K, 1, 1)
        return known
    except (ValueError, TypeError, LookupError, ArithmeticError):
        return None


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e15:
        raise ValueError(f"{value!r} is no measured number")
    return float(value)


def _whole(value: Any) -> int:
    if _number(value) != int(value):
        raise ValueError(f"{value!r} is no whole number")
    return int(value)


def _write(path: Path, known: Calibration) -> None:
    told = {
        "format": FORMAT,
        "about": known.about,
        "pruner": known.pruner,
        "N": known.N,
        "in_tower": known.in_tower,
        "row_bytes": known.row_bytes,
        "runs": [{**run.place._asdict(), "ms": run.ms, "nbytes": run.nbytes} for run in known.runs],
    }
    try:
        keep(path, json.dumps(told, indent=1) + "\n")
    except UserError as e:
        print(
            f"note: the calibration cannot be kept, so the next run makes it anew: {e}",
            file=sys.stderr,
        )
