"""A model of mlx-vlm's, run and timed on this machine with pictures of several sizes.

The pictures are a request's largest image, made smaller; the words are filled up. How many visual
tokens an image becomes is read from the shape of the tower's output, which is not computed.

Shapes: N visual tokens of a picture, K kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import mlx.core as mx
from PIL import Image

from ..checkpoints.errors import UserError
from ..generation.request import Request
from ..hosts.compatibility import check_pipeline
from ..hosts.host import Host, generation_stream
from ..hosts.prefill import prefill_through_cuts
from ..hosts.prepared_inputs import PreparedInputs, ProcessorOptions
from ..hosts.prompt import (
    budgets_by_view,
    encode_images,
    encode_images_and_text,
    prepare_prompt,
    prune_prompt,
    share_budget,
)
from ..hosts.stream import open_images, processor_options, read_first_token
from ..hosts.turns import RequestTurns
from ..machine.hardware import environment
from ..pruners import Pipeline, plan
from ..pruners.contract import Policy
from .calibration import LONG_TEXT, MemoryClock, timed_runs
from .host_calibration import HostCalibration, SizedRun

SMALLER = (1 / 4, 1 / 2)  # sides, of those of a request's largest image
LEAST_SIDE = 28  # pixels
WORD, TRIES = "a", 4  # what prompts are filled up with, and how often


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
    def feasible(self) -> list[int]:
        """Every K that the images can keep, below the largest's N, ascending. Raises UserError
        where there is none."""
        return feasible_budgets(self.host, self.pipeline, self.views)


def open_prompt(host: Host, pipeline: Pipeline, request: Request) -> HostPrompt:
    """Open a request's images and prepare its prompt. Raises UserError, also without an image."""
    if not request.images:
        raise UserError("a budget needs an image; without one there is nothing to prune")
    policy = check_pipeline(host, pipeline, request.positions)
    images, options = open_images(request), processor_options(request.given_host_options)
    with RequestTurns(host).turn():  # tokenizers are not for several threads
        inputs = prepare_prompt(
            host, request.prompt, images, request.chat_template_config, options, request.history,
            request.system,
        )  # fmt: skip
    mx.eval(inputs.pixels)
    views = tokens_by_view(host, inputs)
    _, picture = max(zip(views, images, strict=True), key=lambda pair: sum(pair[0]))
    return HostPrompt(host, pipeline, policy, options, inputs, views, picture)


def tokens_by_view(host: Host, inputs: PreparedInputs) -> list[list[int]]:
    """The visual tokens of each view of each image; the tower's output is not computed."""
    views = encode_images(host, inputs, plan("none"))
    sizes: list[list[int]] = [[] for _ in range(1 + max(view.image for view in views))]
    for view in views:
        sizes[view.image].append(view.signals.x_BND.shape[1])
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
    if not pipeline.decoder and all(len(sizes) == 1 for sizes in views):
        return list(range(1, N))
    for K in range(1, N):
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
        if step and layers:
            left = pipeline.budgets(n, part).before_last
            step.call(step.method.schedule, layers.depth, left, part)


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
    """One answer of one token, timed as `generate` times it; K of each picture stay."""
    host, inputs, clock = prompt.host, timed.inputs, MemoryClock()
    chain = prompt.pipeline if K < timed.N else plan("none")
    with RequestTurns(host).turn():
        with generation_stream(), clock.running():
            views = encode_images_and_text(host, inputs, chain)
            budgets = budgets_by_view(views, None, K, chain)
            pruned = prune_prompt(host, inputs, views, chain, budgets, prompt.policy)
            pruned = prefill_through_cuts(host, pruned, chain, budgets, prompt.policy)
        pictures = [timed.picture] * len(timed.views)
        result = read_first_token(host, pruned, chain, pictures, prompt.options, clock)
    clock.add_peak("prefill")  # with what is drawn behind the first token
    return SizedRun(
        K, timed.text, len(timed.views), clock.ms, clock.nbytes, timed.N, pruned.length,
        result.cache_bytes, sum(view.nbytes for view in views),
    )  # fmt: skip


def measure(prompt: HostPrompt) -> HostCalibration:
    """Run the model with a handful of K on the prompt's picture at several sizes."""
    sizes = timed_sizes(prompt)
    settings = settings_to_run(prompt, sizes)
    spec = prompt.pipeline.spec
    runs = timed_runs(settings, lambda setting: run_once(prompt, *setting), spec)
    pictures = tuple((*timed.picture.size, timed.N) for timed in sizes)
    return HostCalibration(spec, pictures, runs, environment(dtype_of(prompt.host)))


def timed_sizes(prompt: HostPrompt) -> list[TimedPrompt]:
    """Of up to three numbers of visual tokens one picture each, the fewest first; the last is as
    large as the prompt's."""
    assert prompt.picture is not None, "it is to be run"
    sides, of_N, most = prompt.picture.size, dict[int, TimedPrompt](), max(prompt.tokens)
    width, height = sides
    sizes = [(round(width * share), round(height * share)) for share in SMALLER]
    # Where every picture is made as large, a longer one is cut into fewer tiles.
    sizes.append((width, height // 2) if width >= height else (width // 2, height))
    for width, height in sizes:
        timed = timed_prompt(prompt, (max(LEAST_SIDE, width), max(LEAST_SIDE, height)))
        if most > timed.N and _can_shrink(prompt, timed):
            of_N[timed.N] = timed
    fewest = sorted(of_N)
    if len(fewest) > 2:
        fewest = [fewest[0], min(fewest[1:], key=partial(_far, most / 2))]
    return [*(of_N[N] for N in fewest), timed_prompt(prompt, sides)]


def _can_shrink(prompt: HostPrompt, timed: TimedPrompt) -> bool:
    """Whether the method can keep fewer of this picture's tokens."""
    try:
        return bool(feasible_budgets(prompt.host, prompt.pipeline, timed.views))
    except UserError:
        return False


def settings_to_run(
    prompt: HostPrompt, sizes: Sequence[TimedPrompt]
) -> list[tuple[TimedPrompt, int]]:
    """Of each size from the least K to N; of the largest a long text too, and for several images
    all of them at once."""
    settings, images = list[tuple[TimedPrompt, int]](), len(prompt.tokens)
    for timed in sizes:
        feasible = feasible_budgets(prompt.host, prompt.pipeline, timed.views)
        quarter, half = (min(feasible, key=partial(_far, timed.N / part)) for part in (4, 2))
        ends = {feasible[0], half, feasible[-1]}
        settings += [
            (timed, K) for K in sorted(ends | ({quarter} if timed is sizes[-1] else set()))
        ]
        settings.append((timed, timed.N))
    full = settings.pop()
    text = max(LONG_TEXT, 1 << (prompt.text - 1).bit_length())
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
