"""A calibration: the model run and timed on this machine with a handful of K.

The medians of its runs predict any other K (prediction.py). The speed of a machine changes from
minute to minute, so a few runs before each prediction measure its present level, a factor.

Calibrations lie in the user's cache folder, by model, pruner, dtype, device and versions. A file
that is damaged, old or not writable costs the time of a new calibration, and nothing else.

MLX_VLM_PRUNE_CALIBRATION_SECONDS sets about how long its timed runs may take in all: a number
above 0, 8 by default. A short calibration predicts with less certainty.

Shapes: N visual tokens of an image, K kept, R runs.
"""

import hashlib
import itertools
import json
import logging
import math
import os
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from typing import Any, Protocol, TypeVar

import mlx.core as mx
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from tqdm import tqdm

from ..checkpoints.errors import UserError
from ..checkpoints.reading.files import read_json
from ..checkpoints.user_module import file_digests
from ..generation.steps import greedy
from ..generation.stream import PreparedPrompt
from ..inputs.prompt import Prompt
from ..machine.clock import Clock
from ..machine.hardware import environment
from ..machine.user_cache import cache_folder, model_key, write_cached
from ..models.vlm import VLM
from ..pruners import Pipeline, Stage, plan
from ..pruners.budget import feasible_budgets
from .operations import cache_bytes
from .prediction import PARTS, Run, Setting, Table, most_run, predict, tabulate

logger = logging.getLogger("mlx_vlm_prune")
SECONDS_VARIABLE = "MLX_VLM_PRUNE_CALIBRATION_SECONDS"
DEFAULT_SECONDS = 8.0
# Rounds over all settings: as many as fit into the seconds, from FEWEST_ROUNDS to MOST_ROUNDS. Of a
# slow model as many as fit into PATIENCE times the seconds, but at least two.
FEWEST_ROUNDS, MOST_ROUNDS, PATIENCE = 4, 12, 3.75
SHORT_TEXT, LONG_TEXT = 8, 128  # tokens; the long text is longer where the prompt is
LEVEL_RUNS = 3  # that measure the machine's present level
WITHIN_SHARE = 0.95  # of the runs are to stay within a budget
LEAST_SLACK = 1.06  # half a minute does not show how a machine drifts, see docs/log.md
BUSY_SLACK = 1.5  # above which a calibration is not saved
FORMAT = 1  # of the files
# What is raised where a file is damaged.
DAMAGED = (UserError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError)
STATISTICS: Mapping[str, Callable] = {"ms": median, "nbytes": max}
ALTERNATIVES = "a smaller image (downsample) or a method inside the tower (tome) may"

SettingT = TypeVar("SettingT")
RunT = TypeVar("RunT", bound=Run)


@dataclass(frozen=True)
class Calibration:
    """Runs of one model with one pruner, in order, and the environment that they are valid for.

    `in_tower`: the tower's work depends on K. `row_bytes`: the bytes of a cache row in all layers.
    """

    pruner: str
    N: int
    in_tower: bool
    row_bytes: int
    runs: tuple[Run, ...]
    environment: Mapping[str, Any]

    def ms(self, K: Any, text: Any, images: Any) -> dict[str, Any]:
        """The predicted ms of each part up to the first token, without opening the images."""
        return predict(self.tables["ms"], self.N, K, text, images)

    def nbytes(self, K: Any, text: Any, images: Any) -> dict[str, Any]:
        """The predicted most bytes that each part holds beside the weights and the pixels."""
        return predict(self.tables["nbytes"], self.N, K, text, images)

    @cached_property
    def tables(self) -> dict[str, Table]:
        return {name: tabulate(self.runs, name, f, self.in_tower) for name, f in STATISTICS.items()}

    def rows(self, K: Any, text: Any, images: Any) -> Any:
        """The rows of a prompt."""
        return text + images * K

    @property
    def alternatives(self) -> str:
        """What else may meet a budget that this method cannot meet; empty for nothing."""
        return "" if self.in_tower else ALTERNATIVES

    @cached_property
    def slack(self) -> float:
        """The factor that 19 of 20 runs exceed their prediction by, at most."""
        expected_ms = self.ms(*np.array([run.setting for run in self.runs]).T)
        return slack(self.runs, sum(expected_ms.values()))

    @property
    def typical_setting(self) -> Setting:
        """One image, the shortest text, about half of the tokens."""
        typical = min(self.runs, key=lambda run: (run.images, run.text, abs(run.K - self.N / 2)))
        return typical.setting

    @property
    def most_run(self) -> tuple[int, int]:
        """The most text, and the most images."""
        return most_run(self.runs)

    def covers(self, text: int, images: int) -> bool:
        """Whether at least as much text and as many images were run."""
        most_text, most_images = self.most_run
        return text <= most_text and images <= most_images


def slack(runs: Sequence[Run], expected_R: np.ndarray) -> float:
    """The factor that 19 of 20 runs exceed their prediction by, at most.

    A run's prediction is scaled to the level of the LEVEL_RUNS before it. The error of the straight
    lines is included.
    """
    level_R = np.array([sum(run.ms.values()) for run in runs]) / expected_R
    level_before_R = np.median(sliding_window_view(level_R[:-1], LEVEL_RUNS), axis=1)
    excess_R = np.sort(level_R[LEVEL_RUNS:] / level_before_R)
    return max(LEAST_SLACK, float(excess_R[math.ceil(WITHIN_SHARE * len(excess_R)) - 1]))


def measure(
    model: VLM, pipeline: Pipeline, inputs: PreparedPrompt, older: Calibration | None = None
) -> Calibration:
    """Run the model with a handful of K on the pictures of a request, with as much text and as many
    images as `older` held for, so that requests of two kinds are not calibrated in turns."""
    words, images = older.most_run if older else (0, 0)
    words, images = max(words, inputs.text_tokens), max(images, len(inputs.visible))
    settings = settings_to_run(model, pipeline, images, words)
    runs = timed_runs(settings, partial(run_once, model, pipeline, inputs), pipeline.spec)
    text = model.config.text
    row_bytes = cache_bytes(text, [1] * text.num_hidden_layers, model.dtype.size)
    in_tower = bool(pipeline.at(Stage.IMAGE, Stage.ENCODER))
    return Calibration(pipeline.spec, model.N, in_tower, row_bytes, runs, environment(model.dtype))


def timed_runs(
    settings: Sequence[SettingT], run: Callable[[SettingT], RunT], spec: str
) -> tuple[RunT, ...]:
    """Rounds over the settings, with a progress bar.

    Every round runs all settings, so that a machine that slows down does so for all of them.
    """
    limit_s = seconds_allowed()
    for _ in range(2):  # the first time is warm-up
        ends = [run(setting) for setting in (settings[0], settings[-1])]
    round_s = len(settings) * sum(sum(each.ms.values()) for each in ends) / 2000
    fewest = max(2, min(FEWEST_ROUNDS, int(PATIENCE * limit_s / round_s)))
    rounds = min(MOST_ROUNDS, max(fewest, int(limit_s / round_s)))
    order = [s for n in range(rounds) for s in random.Random(n).sample([*settings], len(settings))]
    bar = tqdm(order, desc=f"calibrating {spec}", unit="run", leave=False, file=sys.stderr)
    return tuple(run(setting) for setting in bar)


def seconds_allowed() -> float:
    """How long the timed runs may take in all. Raises UserError for a variable that is no number
    above 0."""
    value = os.environ.get(SECONDS_VARIABLE) or str(DEFAULT_SECONDS)
    try:
        limit = float(value)
    except ValueError:
        limit = math.nan
    if not 0 < limit < math.inf:
        raise UserError(f"{SECONDS_VARIABLE} is {value!r}; it is a number of seconds above 0")
    return limit


def settings_to_run(model: VLM, pipeline: Pipeline, images: int, text: int) -> list[Setting]:
    """From the least K to N; a long text too; and for several images, all of them at once."""
    N = model.N
    feasible = feasible_budgets(pipeline, model.grid, model.config.text.num_hidden_layers)
    quarter, half = (min(feasible, key=lambda K: abs(K - N / part)) for part in (4, 2))
    long = max(LONG_TEXT, 1 << (text - 1).bit_length())
    settings = [(K, SHORT_TEXT, 1) for K in sorted({feasible[0], quarter, half, feasible[-1]})]
    if images > 1:
        settings += [(quarter, SHORT_TEXT, images), (N, SHORT_TEXT, images), (N, long, images)]
    return [*settings, (quarter, long, 1), (N, long, 1), (N, SHORT_TEXT, 1)]


def run_once(model: VLM, pipeline: Pipeline, inputs: PreparedPrompt, setting: Setting) -> Run:
    """One forward pass up to the first token, timed as `generate` times it."""
    assert inputs.pixels is not None
    K, text, images = setting
    prompt = synthetic_prompt(model, text, images)
    pixels = inputs.pixels[mx.arange(images) % len(inputs.pixels)]  # there may be fewer
    mx.eval(pixels)
    clock = MemoryClock()
    with clock.running():
        prefill = model([prompt], pixels, pipeline if K < model.N else plan("none"), K)
        clock.end_part("prefill", greedy(prefill.logits_BV))
    return Run(*setting, clock.ms, clock.nbytes)


class MemoryClock(Clock):
    """A clock that also measures the most bytes that each part adds to those held at the start."""

    def __init__(self) -> None:
        super().__init__(PARTS)
        self.start_bytes, self.nbytes = mx.get_active_memory(), dict.fromkeys(PARTS, 0.0)
        mx.reset_peak_memory()

    def end_part(self, name: str, value: Any = None) -> Any:
        super().end_part(name, value)
        self.add_peak(self.part(name))
        return value

    def add_peak(self, part: str) -> None:
        """Count what was held since the last part's end in a part."""
        self.nbytes[part] = max(self.nbytes[part], mx.get_peak_memory() - self.start_bytes)
        mx.reset_peak_memory()


def synthetic_prompt(model: VLM, text: int, images: int) -> Prompt:
    """A prompt of `text` tokens, with the images in the middle."""
    N, image_id, middle = model.N, model.config.image_token_id, text // 2
    token = itertools.cycle(i for i in range(model.config.text.vocab_size) if i != image_id)
    ids = list(itertools.islice(token, text))
    ids[middle:middle] = [image_id] * (images * N)
    return Prompt(ids, [(middle + image * N, N) for image in range(images)])


class WithSlack(Protocol):
    """A calibration of any kind of model."""

    @property
    def slack(self) -> float: ...


CalibrationT = TypeVar("CalibrationT", bound=WithSlack)
_loaded: dict[Path, Any] = {}  # those that this process measured or read


def calibrate(
    model: VLM, folder: Path | None, pipeline: Pipeline, inputs: PreparedPrompt, force: bool = False
) -> Calibration:
    """The calibration for a request: from this process, from the cache folder, or a new one.

    With `force` it is always a new one.
    """
    return kept_or_measured(
        calibration_file(folder, pipeline.spec, str(model.dtype), str(mx.default_device())),
        force,
        lambda path: load_calibration(path, environment(model.dtype)),
        lambda kept: kept.covers(inputs.text_tokens, len(inputs.visible)),
        lambda older: measure(model, pipeline, inputs, older),
    )


def kept_or_measured(
    path: Path | None, force: bool, read: Callable[[Path], CalibrationT | None],
    covers: Callable[[CalibrationT], bool], measure: Callable[[CalibrationT | None], CalibrationT],
) -> CalibrationT:  # fmt: skip
    """What this process has, or the file, where it covers the request; else a new one, kept, which
    is measured knowing the older one."""
    older: CalibrationT | None = (_loaded.get(path) or read(path)) if path else None
    calibration = None if force else older
    if not calibration or not covers(calibration):
        calibration = measure(older)
        if path:
            _save(path, calibration)
    if path:
        _loaded[path] = calibration
    return calibration


def calibration_file(folder: Path | None, *kind: str) -> Path | None:
    """The file of a calibration of this kind; None for a model without files."""
    try:
        key = model_key(folder) if folder else None
    except UserError:
        key = None
    files = file_digests(kind[0])  # of methods of the user's own in the chain
    encoded = json.dumps([kind, files] if files else kind).encode()
    name = f"{key}-{hashlib.sha256(encoded).hexdigest()[:8]}.json"
    return cache_folder() / "calibrations" / name if key else None


def load_calibration(path: Path, expected: Mapping[str, Any]) -> Calibration | None:
    """The file's calibration, if it is complete and of the expected environment."""
    try:
        content = read_content(path, expected)
        runs = tuple(Run(**run) for run in content.pop("runs"))
        calibration = Calibration(**content, runs=runs, environment=expected)
        check_figures([calibration.N, calibration.row_bytes], runs)
        with np.errstate(divide="raise", invalid="raise"):  # fails where runs are missing
            calibration.slack, calibration.nbytes(1, 1, 1)
        return calibration
    except DAMAGED:
        return None


def read_content(path: Path, expected: Mapping[str, Any]) -> dict[str, Any]:
    """A file's fields. Raises ValueError for one of another format or environment."""
    content: dict[str, Any] = read_json(path)
    if content.pop("format") != FORMAT or content.pop("about") != expected:
        raise ValueError("of another format or environment")
    return content


def check_figures(numbers: Sequence[Any], runs: Sequence[Run]) -> None:
    """Raises ValueError for figures that cannot have been measured."""
    figures = [x for r in runs for x in (*r.setting, *r.ms.values(), *r.nbytes.values())]
    array = np.array([*numbers, *figures])
    if array.dtype.kind not in "if" or not ((array >= 0) & (array < 1e15)).all():
        raise ValueError("figures that cannot have been measured")


def _save(path: Path, calibration: Any) -> None:
    """Save a calibration, unless the machine was busy with something else. Logs why."""
    if calibration.slack > BUSY_SLACK:
        logger.warning(
            "while calibrating, runs took up to %.1f x as long as usual: the machine is busy,"
            " budgets are chosen with care, and the next run calibrates again",
            calibration.slack,
        )
        return
    content = asdict(calibration)
    content |= {"format": FORMAT, "about": content.pop("environment")}
    try:
        write_cached(path, json.dumps(content, indent=1) + "\n")
    except UserError as e:
        logger.warning("the calibration cannot be kept, so the next run makes it again: %s", e)
