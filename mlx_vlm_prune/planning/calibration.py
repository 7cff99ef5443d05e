"""A calibration: the model run and timed with a handful of K, and what any K takes by it.

The tower and the pruner are predicted from K, the prefill from the rows that are read (words, and
K tokens of every image; of a decoder method the average layer's), all by straight lines between
the medians of the runs. The speed of a machine changes from minute to minute, so a few runs before
each prediction measure its present level, a factor.

Calibrations lie in the user's cache folder, by model, pruner, dtype, device and versions. A file
that is damaged, old or not writable costs the time of a new calibration, and nothing else.

MLX_VLM_PRUNE_CALIBRATION_SECONDS sets about how long its timed runs may take in all: a number
above 0, 8 by default. A short calibration predicts with less certainty.

Shapes: N visual tokens of an image, K kept, S settings, R runs.
"""

import hashlib
import itertools
import json
import math
import os
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean, median
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from tqdm import tqdm

from ..checkpoints.errors import UserError
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

PARTS = ("vision", "pruner", "prefill")
SWITCH = "MLX_VLM_PRUNE_CALIBRATION_SECONDS"
# Runs of each setting: as many as fit into the seconds, FEW to MANY; of a slow model what fits
# into PATIENCE times the seconds, but two.
SECONDS, PATIENCE, FEW, MANY = 8.0, 3.75, 4, 12
SHORT, LONG = 8, 128  # words; the long text is longer where the prompt is
LEVEL_RUNS = 3  # that tell the level of what comes next
SURE = 0.95  # share of runs that are to stay within a budget
STEADY = 1.06  # the least slack: half a minute does not show how a machine drifts, see docs/log.md
BUSY = 1.5  # a slack above which a calibration is not kept
FORMAT = 1  # of the files

Setting = tuple[int, int, int]  # K of each image's N tokens, words, images
Table = dict[str, np.ndarray]  # a row per setting; its three columns and those of PARTS


@dataclass(frozen=True)
class Run:
    """What each part took at a setting, in ms, and the most bytes it held beside the weights and
    the pixels."""

    K: int
    text: int
    images: int
    ms: Mapping[str, float]
    nbytes: Mapping[str, float]

    @property
    def setting(self) -> Setting:
        return self.K, self.text, self.images


@dataclass(frozen=True)
class Calibration:
    """Runs of one model with one pruner, in order, and the environment that they are valid for.

    `in_tower` says whether the tower's work depends on K. `row_bytes` are those of a cache row
    in all layers together.
    """

    pruner: str
    N: int
    in_tower: bool
    row_bytes: int
    runs: tuple[Run, ...]
    environment: Mapping[str, Any]

    def ms(self, K: Any, text: Any, images: Any) -> dict[str, Any]:
        """Each part's expected time up to the first token; opening the images is not in it."""
        return predict(self._tables["ms"], self.N, K, text, images)

    def nbytes(self, K: Any, text: Any, images: Any) -> dict[str, Any]:
        """The most that each part holds beside the weights and the pixels."""
        return predict(self._tables["nbytes"], self.N, K, text, images)

    @cached_property
    def _tables(self) -> dict[str, Table]:
        statistics: dict[str, Callable] = {"ms": median, "nbytes": max}
        return {name: tabulate(self.runs, name, f, self.in_tower) for name, f in statistics.items()}

    @cached_property
    def slack(self) -> float:
        """By what factor 19 of 20 runs exceed, at most, what those right before let expect; the
        error of the straight lines is in it."""
        expected_ms = self.ms(*np.array([run.setting for run in self.runs]).T)
        level_R = np.array([sum(run.ms.values()) for run in self.runs]) / sum(expected_ms.values())
        before = np.median(sliding_window_view(level_R[:-1], LEVEL_RUNS), axis=1)
        excess = np.sort(level_R[LEVEL_RUNS:] / before)
        return max(STEADY, float(excess[math.ceil(SURE * len(excess)) - 1]))

    @property
    def typical(self) -> Setting:
        """One image, the shortest text, about half of the tokens."""
        usual = min(self.runs, key=lambda run: (run.images, run.text, abs(run.K - self.N / 2)))
        return usual.setting

    def covers(self, text: int, images: int) -> bool:
        """Whether as many words and as many images were run."""
        most_text, most_images = np.max([run.setting[1:] for run in self.runs], axis=0)
        return bool(text <= most_text and images <= most_images)


def tabulate(runs: Sequence[Run], figure: str, statistic: Callable, in_tower: bool) -> Table:
    """The statistic over the runs of each setting, K ascending. Where the tower's work does not
    depend on K, its figure for one image is the median of all K."""
    settings = sorted({run.setting for run in runs})
    table = dict(zip(("K", "text", "images"), np.array(settings).T, strict=True))
    for part in PARTS:
        values = [[getattr(r, figure)[part] for r in runs if r.setting == s] for s in settings]
        table[part] = np.array([statistic(one) for one in values], dtype=float)
    if not in_tower:
        single = table["images"] == 1
        table["vision"][single] = np.median(table["vision"][single])
    return table


def predict(table: Table, N: int, K: Any, text: Any, images: Any) -> dict[str, Any]:
    """Each part's figure at settings, numbers or arrays: of the prefill by rows; of the others by
    K, as of one image and the shortest text, times its growth with images and words."""
    short, long = table["text"].min(), table["text"].max()
    several = table["images"] > 1
    longer = ~several & (table["text"] > short)
    images_share = (images - 1) / max(1, table["images"].max() - 1)
    text_share = (text - short) / max(1, long - short)
    vision, pruner = (
        by_tokens(table, part, N, K) * growth(table, part, N, several, images_share)
        for part in ("vision", "pruner")
    )
    pruner = pruner * growth(table, "pruner", N, longer, text_share)
    return {"vision": vision, "pruner": pruner, "prefill": by_rows(table, text + images * K)}


def by_tokens(table: Table, part: str, N: int, K: Any) -> np.ndarray:
    """A part's figure with one image and the shortest text. With N nothing is pruned, so it
    stands apart from the straight lines."""
    basic = (table["images"] == 1) & (table["text"] == table["text"].min())
    x, y = table["K"][basic], table[part][basic]
    return np.where(K == N, y[x == N][0], np.interp(K, x[x < N], y[x < N]))


def growth(table: Table, part: str, N: int, more: np.ndarray, share: Any) -> Any:
    """By what factor a part grows, a share of the way to the settings of the mask `more`."""
    pruned = more & (table["K"] < N)
    basic = by_tokens(table, part, N, table["K"][pruned])
    ratios = table[part][pruned][basic != 0] / basic[basic != 0]
    return np.maximum(0, 1 + share * (np.median(ratios) - 1)) if len(ratios) else 1.0


def by_rows(table: Table, rows: Any) -> Any:
    """The prefill's figure; beyond the most rows that were run, as steep as before."""
    rows_S = table["text"] + table["images"] * table["K"]
    x = np.unique(rows_S)
    y = rising([np.median(table["prefill"][rows_S == n]) for n in x])
    beyond = np.maximum(0, rows - x[-1])
    return np.interp(rows, x, y) + beyond * (y[-1] - y[-2]) / (x[-1] - x[-2])


def rising(values: Sequence[float]) -> list[float]:
    """The nearest values, by least squares, none of which is below the one before it."""
    blocks: list[list[float]] = []
    for value in values:
        blocks.append([value])
        while len(blocks) > 1 and fmean(blocks[-2]) > fmean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    return [fmean(block) for block in blocks for _ in block]


def measure(model: VLM, pipeline: Pipeline, inputs: PreparedPrompt) -> Calibration:
    """Run the model with a handful of K on the pictures of a request.

    The settings take turns, so that a machine that slows down does so for all of them.
    """
    settings, limit = design(model, pipeline, inputs), seconds()
    for _ in range(2):  # the first time is warm-up
        ends = [run_once(model, pipeline, inputs, s) for s in (settings[0], settings[-1])]
    once = len(settings) * sum(sum(end.ms.values()) for end in ends) / 2000
    few = max(2, min(FEW, int(PATIENCE * limit / once)))
    rounds = min(MANY, max(few, int(limit / once)))
    order = [s for n in range(rounds) for s in random.Random(n).sample(settings, len(settings))]
    bar = tqdm(order, desc=f"calibrating {pipeline.spec}", unit="run", leave=False, file=sys.stderr)
    runs = tuple(run_once(model, pipeline, inputs, setting) for setting in bar)
    text = model.config.text
    row_bytes = cache_bytes(text, [1] * text.num_hidden_layers, model.dtype.size)
    in_tower = bool(pipeline.at(Stage.IMAGE, Stage.ENCODER))
    return Calibration(pipeline.spec, model.N, in_tower, row_bytes, runs, environment(model.dtype))


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


def design(model: VLM, pipeline: Pipeline, inputs: PreparedPrompt) -> list[Setting]:
    """What is run: from the least K to N, a long text too, and, where there are several images,
    all of them at once."""
    N, images = model.N, len(inputs.visible)
    feasible = feasible_budgets(pipeline, model.grid, model.config.text.num_hidden_layers)
    quarter, half = (min(feasible, key=lambda K: abs(K - N / part)) for part in (4, 2))
    long = max(LONG, 1 << (inputs.text - 1).bit_length())
    settings = [(K, SHORT, 1) for K in sorted({feasible[0], quarter, half, feasible[-1]})]
    if images > 1:
        settings += [(quarter, SHORT, images), (N, SHORT, images), (N, long, images)]
    return [*settings, (quarter, long, 1), (N, long, 1), (N, SHORT, 1)]


def run_once(model: VLM, pipeline: Pipeline, inputs: PreparedPrompt, setting: Setting) -> Run:
    """One forward pass to the first token, timed as `generate` times it."""
    assert inputs.pixels is not None
    K, text, images = setting
    row, pixels = words(model, text, images), inputs.pixels[:images]
    mx.eval(pixels)
    clock = MemoryClock()
    with clock.running():
        prefill = model([row], pixels, pipeline if K < model.N else plan("none"), K)
        clock.end_part("prefill", greedy(prefill.logits_BV))
    return Run(*setting, clock.ms, clock.nbytes)


class MemoryClock(Clock):
    """A clock that notes, too, the most bytes that each part held beside what was there."""

    def __init__(self) -> None:
        super().__init__(PARTS)
        self.before, self.nbytes = mx.get_active_memory(), dict.fromkeys(PARTS, 0.0)
        mx.reset_peak_memory()

    def end_part(self, name: str, value: Any = None) -> Any:
        super().end_part(name, value)
        part = self.part(name)
        self.nbytes[part] = max(self.nbytes[part], mx.get_peak_memory() - self.before)
        mx.reset_peak_memory()
        return value


def words(model: VLM, text: int, images: int) -> Prompt:
    """A prompt of so many words, the images in the middle."""
    N, image_id, middle = model.N, model.config.image_token_id, text // 2
    word = itertools.cycle(i for i in range(model.config.text.vocab_size) if i != image_id)
    ids = list(itertools.islice(word, text))
    ids[middle:middle] = [image_id] * (images * N)
    return Prompt(ids, [(middle + image * N, N) for image in range(images)])


_loaded: dict[Path, Calibration] = {}  # what this process measured or read


def calibrate(
    model: VLM, folder: Path | None, pipeline: Pipeline, inputs: PreparedPrompt, anew: bool = False
) -> Calibration:
    """The calibration for a request: this process's, the cache folder's, or a new one."""
    path, calibration = _path(model, folder, pipeline), None
    if path and not anew:
        calibration = _loaded.get(path) or read(path, environment(model.dtype))
    if not calibration or not calibration.covers(inputs.text, len(inputs.visible)):
        calibration = measure(model, pipeline, inputs)
        if path:
            _write(path, calibration)
    if path:
        _loaded[path] = calibration
    return calibration


def _path(model: VLM, folder: Path | None, pipeline: Pipeline) -> Path | None:
    """Where it lies; None for a model without files."""
    try:
        key = model_key(folder) if folder else None
    except UserError:
        key = None
    kind = json.dumps([pipeline.spec, str(model.dtype), str(mx.default_device())])
    name = f"{key}-{hashlib.sha256(kind.encode()).hexdigest()[:8]}.json"
    return cache_folder() / "calibrations" / name if key else None


def read(path: Path, expected: Mapping[str, Any]) -> Calibration | None:
    """The file's calibration, if it is whole and of the expected environment."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("format") != FORMAT or content.pop("about") != expected:
            return None
        runs = tuple(Run(**run) for run in content.pop("runs"))
        calibration = Calibration(**content, runs=runs, environment=expected)
        figures = [x for r in runs for x in (*r.setting, *r.ms.values(), *r.nbytes.values())]
        numbers = np.array([calibration.N, calibration.row_bytes, *figures])
        if numbers.dtype.kind not in "if" or not ((numbers >= 0) & (numbers < 1e15)).all():
            return None
        with np.errstate(divide="raise", invalid="raise"):  # fails where runs are missing
            calibration.slack, calibration.nbytes(1, 1, 1)
        return calibration
    except (OSError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError,
            RecursionError):  # fmt: skip
        return None


def _write(path: Path, calibration: Calibration) -> None:
    """Keep it, but not of a machine that was busy with something else. Notes go to stderr."""
    if calibration.slack > BUSY:
        print(
            f"note: while calibrating, runs took up to {calibration.slack:.1f} x as long as usual:"
            " the machine is busy, budgets are chosen with care, and the next run calibrates anew",
            file=sys.stderr,
        )
        return
    content = asdict(calibration)
    content |= {"format": FORMAT, "about": content.pop("environment")}
    try:
        write_cached(path, json.dumps(content, indent=1) + "\n")
    except UserError as e:
        note = f"note: the calibration cannot be kept, so the next run makes it anew: {e}"
        print(note, file=sys.stderr)
