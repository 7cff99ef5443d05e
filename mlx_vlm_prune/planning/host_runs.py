"""A model of mlx-vlm's, run and timed on this machine with pictures of several sizes.

The pictures are a request's largest image, made smaller; the words are filled up. How many visual
tokens an image becomes is read from the shape of the tower's output, which is not computed.

Shapes: N visual tokens of a picture, K kept.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from ..checkpoints.errors import UserError
from ..generation.request import Request
from ..hosts.compatibility import check_cache_options, check_pipeline
from ..hosts.host import Host, generation_stream
from ..hosts.prefill import prefill_through_cuts
from ..hosts.prepared_inputs import PreparedInputs, ProcessorOptions
from ..hosts.prompt import (
    ImageBudget,
    encode_images,
    encode_images_and_text,
    prepare_prompt,
    prune_prompt,
    share_budget,
    shares,
)
from ..hosts.stream import cache_options, open_images, processor_options, read_first_token
from ..hosts.turns import RequestTurns
from ..machine.hardware import environment
from ..pruners import Pipeline, Stage, plan
from ..pruners.contract import Policy
from .calibration import LONG_TEXT, MemoryClock, timed_runs
from .host_calibration import HostCalibration, SizedRun

SMALLER = (1 / 4, 1 / 2)  # sides, of those of a request's largest image
LEAST_SIDE, MOST_SIZES = 28, 3  # pixels; of pictures
WORD, TRIES = "a", 4  # what prompts are filled up with, and how often
MOST_GROWTH = 4  # times as many visual tokens as a request has, for what others may have


@dataclass(frozen=True)
class HostPrompt:
    """A request to a model of mlx-vlm's, as far as it is known before the tower runs.

    `views` are the visual tokens of each view of each image; `picture` is the largest image.
    """

    host: Host
    pipeline: Pipeline
    policy: Policy
    options: ProcessorOptions
    inputs: PreparedInputs
    views: list[list[int]]
    picture: Image.Image | None = None  # None where nothing is to be run
    cache_options: Mapping[str, Any] = field(default_factory=dict)  # mlx-vlm's, and of reading

    @cached_property
    def tokens(self) -> tuple[int, ...]:
        """Visual tokens of each image."""
        return tuple(map(sum, self.views))

    @property
    def text(self) -> int:
        """Rows of words."""
        return count_words(self.host, self.inputs)

    @property
    def full_rows(self) -> int:
        """Rows of the images where nothing is pruned: newlines may have placeholders, too."""
        if self.host.placeholder_unit == "token":
            return len(self.inputs.ids) - self.text
        return self.host.full_rows(sum(self.tokens), len(self.tokens))

    @property
    def most_rows(self) -> int:
        """The most rows that the model reads with this method."""
        layers = self.host.language_layers if self.pipeline.decoder else None
        context, window = self.host.context, layers.window if layers else None
        return min(context, window - 1) if window else context

    @cached_property
    def feasible(self) -> list[int]:
        """Every K that the images can keep, below the largest's N, ascending. Raises UserError
        where there is none."""
        return feasible_budgets(self.host, self.pipeline, self.views)


def open_prompt(host: Host, pipeline: Pipeline, request: Request) -> HostPrompt:
    """Open a request's images and prepare its prompt. Raises UserError, also without an image."""
    if not request.images:
        raise UserError("a budget needs an image; without one there is nothing to prune")
    given = request.given_host_options
    policy, of_cache = check_pipeline(host, pipeline, request.positions), cache_options(given)
    check_cache_options(host, pipeline, of_cache)
    images, options = open_images(request), processor_options(given)
    with RequestTurns(host).turn():  # tokenizers are not for several threads
        inputs = prepare_prompt(
            host, request.prompt, images, request.chat_template_config, options, request.history,
            request.system,
        )  # fmt: skip
    mx.eval(inputs.pixels)
    views = tokens_by_view(host, inputs)
    _, picture = max(zip(views, images, strict=True), key=lambda pair: sum(pair[0]))
    return HostPrompt(host, pipeline, policy, options, inputs, views, picture, of_cache)


def tokens_by_view(host: Host, inputs: PreparedInputs) -> list[list[int]]:
    """The visual tokens of each view of each image; the tower's output is not computed."""
    views = encode_images(host, inputs, plan("none"))
    sizes: list[list[int]] = [[] for _ in range(1 + max(view.image for view in views))]
    for view in views:
        sizes[view.image].append(view.N)
    return sizes


def count_words(host: Host, inputs: PreparedInputs) -> int:
    """Ids that stand for no visual token."""
    placeholder = host.image_token_id(inputs)
    return sum(token != placeholder for token in inputs.ids)


def feasible_budgets(host: Host, pipeline: Pipeline, views: Sequence[Sequence[int]]) -> list[int]:
    """Every K below the largest image's N that each image can keep, or all if it has fewer;
    ascending. Raises UserError where there is none."""
    N, feasible, refusal = max(map(sum, views)), list[int](), None
    if N == 1:
        raise UserError("an image is one visual token of this model, so nothing can be pruned")
    every_K = np.arange(1, N)
    shared = [
        (every_K >= sum(sizes)) | (shares(every_K, sizes) > 0).all(axis=-1) for sizes in views
    ]
    possible: list[int] = every_K[np.all(shared, axis=0)].tolist()
    if possible and not pipeline.decoder and len(pipeline.steps) == 1:
        return possible
    for K in possible or [N - 1]:
        try:
            for sizes in views:
                _check_feasible(host, pipeline, K, sizes)
            feasible.append(K)
        except UserError as problem:
            refusal = problem
    if refusal and not feasible:
        raise refusal
    return feasible


def _check_feasible(host: Host, pipeline: Pipeline, K: int, sizes: Sequence[int]) -> None:
    """Raises UserError where an image in views of these sizes cannot keep K."""
    step, layers = pipeline.decoder, host.language_layers
    if sum(sizes) <= K:
        return
    for n, part in zip(sizes, share_budget(K, sizes), strict=True):
        left = pipeline.budgets(n, part).before_last
        if step and layers:
            step.call(step.method.schedule, layers.depth, left, part)
        elif part > left:
            raise UserError(f"{pipeline.spec}: the last method is given {left}, and keeps no more")


@dataclass(frozen=True)
class TimedPrompt:
    """A prompt that is timed: `images` copies of a picture of N visual tokens."""

    inputs: PreparedInputs
    views: list[list[int]]
    text: int
    picture: Image.Image

    @property
    def N(self) -> int:
        return sum(self.views[0])


def timed_prompt(
    prompt: HostPrompt, size: tuple[int, int], images: int = 1, text: int = 1
) -> TimedPrompt:
    """About the prompt's picture at (width, height), with at least `text` words if they can be
    had."""
    assert prompt.picture is not None, "it is to be run"
    host, picture, words = prompt.host, prompt.picture.resize(size), 1
    for _ in range(TRIES):
        question = " ".join([WORD] * words)
        with RequestTurns(host).turn():
            inputs = prepare_prompt(host, question, [picture] * images, None, prompt.options)
        count = count_words(host, inputs)
        if count >= text:
            break
        words += text - count
    mx.eval(inputs.pixels)
    return TimedPrompt(inputs, tokens_by_view(host, inputs), count, picture)


def run_once(prompt: HostPrompt, timed: TimedPrompt, K: int) -> SizedRun:
    """One answer of one token, whose parts are waited for one by one; K of each picture stay.

    `generate` waits like this on a CPU where it prunes; elsewhere it is a little faster.
    """
    host, inputs, clock = prompt.host, timed.inputs, MemoryClock()
    options = prompt.cache_options
    chain = prompt.pipeline if K < timed.N else plan("none")
    with RequestTurns(host).turn():
        with generation_stream(), clock.running():
            by_view = ImageBudget(keep_tokens=K).by_view(chain)
            views = encode_images_and_text(host, inputs, chain, by_view)
            budgets = by_view(views)
            pruned = prune_prompt(host, inputs, views, chain, budgets, prompt.policy)
            piece = options.get("prefill_step_size")
            pruned = prefill_through_cuts(host, pruned, chain, budgets, prompt.policy, piece)
        pictures = [timed.picture] * len(timed.views)
        result = read_first_token(host, pruned, chain, pictures, prompt.options, clock, options)
    clock.add_peak("prefill")  # with what is drawn behind the first token
    # Between layers K is the average of rows that leave after they were counted.
    rows = timed.text + len(timed.views) * K if chain.decoder else pruned.length
    return SizedRun(
        K, timed.text, len(timed.views), clock.ms, clock.nbytes, timed.N, rows,
        result.cache_bytes, sum(view.nbytes for view in views),
    )  # fmt: skip


@dataclass(frozen=True)
class Extent:
    """What a calibration is to hold for: the largest picture's width and height, how many images at
    once, and words."""

    sides: tuple[int, int]
    images: int
    text: int


def extent_of(prompt: HostPrompt, older: HostCalibration | None) -> Extent:
    """What a prompt needs, and what an older calibration held for, so that requests of two kinds
    are not calibrated in turns; without its images where all together would be far more than each.
    """
    assert prompt.picture is not None, "it is to be run"
    sides, images, N = prompt.picture.size, len(prompt.tokens), max(prompt.tokens)
    if not older:
        return Extent(sides, images, prompt.text)
    (width, height, older_N), (text, older_images) = older.pictures[-1], older.most_run
    text, largest, most = max(text, prompt.text), max(N, older_N), max(images, older_images)
    if largest * most > MOST_GROWTH * max(N * images, older_N * older_images):
        return Extent(sides, images, text)
    return Extent((width, height) if older_N > N else sides, most, text)


def measure(prompt: HostPrompt, older: HostCalibration | None = None) -> HostCalibration:
    """Run the model with a handful of K on the prompt's picture at several sizes; what `older` held
    for is run again."""
    extent = extent_of(prompt, older)
    sizes = timed_sizes(prompt, extent.sides)
    settings = settings_to_run(prompt, sizes, extent.images, extent.text)
    spec = prompt.pipeline.spec
    runs = timed_runs(settings, lambda setting: run_once(prompt, *setting), spec)
    pictures = tuple((*timed.picture.size, timed.N) for timed in sizes)
    inside = bool(prompt.pipeline.at(Stage.ENCODER))
    return HostCalibration(spec, pictures, runs, environment(dtype_of(prompt.host)), inside)


def timed_sizes(prompt: HostPrompt, sides: tuple[int, int]) -> list[TimedPrompt]:
    """Of up to three numbers of visual tokens one picture each, the fewest first; the last has
    these sides."""
    (width, height), of_N, full = sides, dict[int, TimedPrompt](), timed_prompt(prompt, sides)
    sizes = [(round(width * share), round(height * share)) for share in SMALLER]
    # Where every picture is made as large, a longer one is cut into fewer tiles.
    sizes.append((width, height // 2) if width >= height else (width // 2, height))
    for width, height in sizes:
        if len(of_N) == MOST_SIZES - 1:
            break
        timed = timed_prompt(prompt, (max(LEAST_SIDE, width), max(LEAST_SIDE, height)))
        if full.N > timed.N and _can_shrink(prompt, timed):
            of_N.setdefault(timed.N, timed)
    return [*(of_N[N] for N in sorted(of_N)), full]


def _can_shrink(prompt: HostPrompt, timed: TimedPrompt) -> bool:
    """Whether the method can keep fewer of this picture's tokens."""
    try:
        return bool(feasible_budgets(prompt.host, prompt.pipeline, timed.views))
    except UserError:
        return False


def settings_to_run(
    prompt: HostPrompt, sizes: Sequence[TimedPrompt], images: int, text: int
) -> list[tuple[TimedPrompt, int]]:
    """Of each size from the least K to N; of the largest a long text too, and for several images
    all of them at once, as far as the model reads so many rows."""
    settings = list[tuple[TimedPrompt, int]]()
    for timed in sizes:
        feasible = feasible_budgets(prompt.host, prompt.pipeline, timed.views)
        quarter, half = (min(feasible, key=partial(_far, timed.N / part)) for part in (4, 2))
        ends = {feasible[0], half, feasible[-1]}
        settings += [
            (timed, K) for K in sorted(ends | ({quarter} if timed is sizes[-1] else set()))
        ]
        settings.append((timed, timed.N))
    full = settings.pop()
    of_image = replace(prompt, inputs=timed.inputs, views=timed.views).full_rows
    images = max(1, min(images, (prompt.most_rows - timed.text) // of_image))
    text = max(LONG_TEXT, 1 << (text - 1).bit_length())
    text = max(1, min(text, prompt.most_rows - images * of_image))
    long = timed_prompt(prompt, timed.picture.size, text=text)
    settings += [(long, quarter), (long, timed.N)]
    if images > 1:
        short, long = (
            timed_prompt(prompt, timed.picture.size, images, words) for words in (1, text)
        )
        settings += [(short, quarter), (short, timed.N), (long, timed.N)]
    return [*settings, full]


def _far(wanted: float, K: int) -> float:
    return abs(K - wanted)


def dtype_of(host: Host) -> mx.Dtype:
    """What the model computes in."""
    return host.embed(mx.array([0])).dtype
