"""A prompt with fewer visual tokens: prepare, encode, prune, project, splice.

Tower and projector are called from here. mlx-vlm's own `stream_generate` decodes: it takes ids,
image features and positions from callers that prepare them (`prompt_arguments`). Nothing is
patched.

Shapes: N visual tokens of a view, K kept of them, U of all views, T words, D features.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from ..checkpoints.errors import UserError, whole_reason
from ..inputs.budget import budget, low_detail_tokens
from ..inputs.messages import Turn
from ..machine.clock import end_part
from ..models.pruning import (
    ImageBatch,
    attention_bias,
    cls_rank,
    probed,
    prune,
    reduction_step,
)
from ..pruners import Pipeline, Stage, StepBudgets
from ..pruners.contract import Policy
from ..pruners.trace import ReductionStep, Trace
from .host import Host
from .prepared_inputs import PreparedInputs, ProcessorOptions
from .prompt_arguments import KeptRows, bias_rows, image_arguments, kept_rows, row_arguments
from .prompt_text import check_prompt, conversation_text, processed, question_text
from .rotation import add_rotation
from .tower_cuts import TowerCuts
from .views import View

PLAIN = ProcessorOptions()
ViewEncoder = Callable[[PreparedInputs], list[View]]
ViewBudgets = Callable[[Sequence[View]], list[int]]  # K of each view, whose tokens are not read


@dataclass(frozen=True)
class ImageBudget:
    """How many tokens of each image stay: a share or a number, half without either; with
    `low_detail` that is `low_detail_tokens`."""

    keep_ratio: float | None = None
    keep_tokens: int | None = None
    low_detail: bool = False

    def by_view(self, pipeline: Pipeline) -> ViewBudgets:
        """What gives each view's K, as a chain is to keep it."""

        def budgets(views: Sequence[View]) -> list[int]:
            share, number = self.keep_ratio, self.keep_tokens
            return budgets_by_view(views, share, number, pipeline, self.low_detail)

        return budgets


@dataclass(frozen=True)
class PrunedPrompt:
    """A prompt with fewer visual tokens, as mlx-vlm's `stream_generate` takes it.

    `trace` has a reduction of every view; `positions` is the policy that holds. `cache` and
    `cache_bytes` are given where all rows but the last are read already.
    """

    inputs: PreparedInputs
    views: list[View]
    arguments: dict[str, Any]
    kept_rows: KeptRows  # of the whole prompt
    length: int  # rows that the language model reads
    trace: Trace
    positions: Policy
    cache: list[Any] | None = None
    cache_bytes: int | None = None
    bias_l: mx.array | None = None  # added to the attention that rows get, with an enhancer
    ranks: Sequence[mx.array | None] = ()  # `cls_rank_BN` of each view, where a method reads it


def prepare_prompt(
    host: Host,
    prompt: str,
    images: Sequence[Image.Image],
    chat_template_config: Mapping[str, Any] | None = None,
    processor_options: ProcessorOptions = PLAIN,
    history: Sequence[Turn] = (),
    system: str | None = None,
) -> PreparedInputs:
    """A prompt and images, through mlx-vlm's chat template and the model's own processor.

    A system message and earlier turns come before it, with their images. Raises UserError.
    """
    check_prompt(host, prompt)
    options = dict(chat_template_config or {})
    if history or system is not None:
        text = conversation_text(host, history, prompt, len(images), options, system)
    else:
        text = question_text(host, prompt, len(images), options)
    part = "images" if images else "prompt"
    return processed(host, text, part, lambda: host.prepare(text, images, processor_options))


def encode_images_and_text(
    host: Host, inputs: PreparedInputs, pipeline: Pipeline, budgets: ViewBudgets | None = None,
    encode: ViewEncoder | None = None,
) -> list[View]:  # fmt: skip
    """The views of the images, with all signals that the pipeline needs; `encode` may have those of
    the tower already, else `budgets` are as for `encode_images`."""
    views = encode(inputs) if encode else encode_images(host, inputs, pipeline, budgets)
    return add_text(host, inputs, views, pipeline)


def signal_layers(host: Host, pipeline: Pipeline) -> dict[str, int | None]:
    """The signals that a chain needs of the tower, with their layers; none of one without any."""
    return pipeline.signal_layers(host.depth, host.layers_behind) if host.depth else {}


def encode_images(
    host: Host, inputs: PreparedInputs, pipeline: Pipeline, budgets: ViewBudgets | None = None
) -> list[View]:
    """The views with the tower's signals; they do not depend on the words of the prompt. A chain
    with a method inside the tower needs each view's K."""
    if inputs.pixels is None:
        return []
    want = signal_layers(host, pipeline)
    try:
        if pipeline.at(Stage.ENCODER):
            assert budgets, "inside the tower a method has a budget"
            cuts = TowerCuts(pipeline, budgets, (host.depth, host.layers_behind))
            views = host.encode_with_cuts(inputs, want, cuts)
        else:
            views = host.encode_images(inputs, want)
    except (ValueError, IndexError) as problem:
        if isinstance(problem, UserError):
            raise
        raise UserError(
            f"the tower of this {host.kind} model cannot read what its processor made; config.json"
            f" and preprocessor_config.json do not fit each other: {whole_reason(problem)}"
        ) from problem
    end_part("vision", [a for view in views for a in (view.signals.x_BND, *view.deepstack)])
    return views


def add_text(
    host: Host, inputs: PreparedInputs, views: list[View], pipeline: Pipeline
) -> list[View]:
    """The views with the embeddings of the prompt's words, and with what the language model's
    rotation makes of their positions, if the pipeline needs them."""
    if pipeline.needs_signal("rotation"):
        views = add_rotation(host, inputs, views)
    if not pipeline.needs_signal("text"):
        return views
    words = [token for token in inputs.ids if token != host.image_token_id(inputs)]
    text_1TD = host.embed(mx.array([words or [0]]))
    real_1T = mx.full((1, text_1TD.shape[1]), bool(words))
    return [
        replace(view, signals=view.signals.replace(text_BTD=text_1TD, text_real_BT=real_1T))
        for view in views
    ]


def budgets_by_view(
    views: Sequence[View], keep_ratio: float | None, keep_tokens: int | None, pipeline: Pipeline,
    low_detail: bool = False,
) -> list[int]:  # fmt: skip
    """Each view's K: an image's budget, shared among its crops. With `low_detail` that is
    `low_detail_tokens`, and one of each crop at least."""
    budgets: list[int] = []
    for image in range(1 + max((view.image for view in views), default=-1)):
        sizes = [view.N for view in views if view.image == image]
        N = sum(sizes)
        if low_detail:
            K = max(budget(N, None, low_detail_tokens(N), pipeline), len(sizes))
        else:
            K = budget(N, keep_ratio, keep_tokens, pipeline)
        budgets += share_budget(K, sizes)
    return budgets


def share_budget(K: int, sizes: Sequence[int]) -> list[int]:
    """An image's K among its views, in proportion to their N.

    Raises UserError where a view would get none.
    """
    parts: list[int] = shares(K, sizes).tolist()
    if min(parts) < 1:
        raise UserError(f"an image in {len(sizes)} crops cannot keep {K} visual tokens: keep more")
    return parts


def shares(K: Any, sizes: Sequence[int]) -> np.ndarray:
    """K, a number or an array of them, shared among views in proportion to their N, (..., views);
    one may get none."""
    ends = np.cumsum([0, *sizes])
    return np.diff(np.asarray(K)[..., None] * ends // ends[-1])


def prune_prompt(
    host: Host,
    inputs: PreparedInputs,
    views: list[View],
    pipeline: Pipeline,
    budgets: Sequence[int],
    policy: Policy,
) -> PrunedPrompt:
    """Prune, project and splice; `budgets` are each view's K.

    What a decoder method is to drop is still there, at its position in the whole prompt.
    """
    policy = "keep" if pipeline.decoder else policy
    if inputs.pixels is None:
        rows = KeptRows.known(range(len(inputs.ids)))
        arguments = row_arguments(host, inputs, rows, policy)
        return PrunedPrompt(inputs, [], arguments, rows, len(rows), Trace([], [], []), policy)
    batches = [ImageBatch.of(view.signals, view.kept) for view in views]
    sizes = [view.N for view in views]
    step_budgets = [pipeline.budgets(N, K) for N, K in zip(sizes, budgets, strict=True)]
    steps = [reduction_step(batches, pipeline.at(Stage.ENCODER))]
    batches, features = _prune(batches, step_budgets, Stage.FEATURES)  # prune
    batches = _project(host, batches, pipeline)  # project
    batches, projected = _prune(batches, step_budgets, Stage.PROJECTED)
    trace = Trace([*steps, *features, *projected], sizes, [view.image for view in views])
    policy = trace.policy(policy)
    rows = kept_rows(host, inputs, views, [batch.kept for batch in batches])  # splice
    arguments = row_arguments(host, inputs, rows, policy)
    arguments |= image_arguments(host, inputs, views, batches)
    length = len(rows)
    if host.placeholder_unit != "token":  # mlx-vlm puts the images' rows in place of one
        words = [row for row in rows.columns if inputs.ids[row] != host.image_token_id(inputs)]
        length = len(words) + sum(map(len, arguments["cached_image_features"]))
    biases = [attention_bias(batch, pipeline.enhancer) for batch in batches]
    bias_l = bias_rows(host, inputs, views, batches, biases, rows)
    ranks = [cls_rank(batch, pipeline) for batch in batches]
    return PrunedPrompt(
        inputs, views, arguments, rows, length, trace, policy, bias_l=bias_l, ranks=ranks
    )


def _prune(
    batches: list[ImageBatch], budgets: Sequence[StepBudgets], stage: Stage
) -> tuple[list[ImageBatch], list[ReductionStep]]:
    """The views after the methods of a stage, each by its own budgets; one step for each method,
    of all views."""
    done = [prune([batch], steps, stage) for batch, steps in zip(batches, budgets, strict=True)]
    steps = [
        ReductionStep(of_views[0].name, 0, [step.reductions[0] for step in of_views])
        for of_views in zip(*(steps for _, steps in done), strict=True)
    ]
    return [batch for (batch,), _ in done], steps


def _project(host: Host, batches: list[ImageBatch], pipeline: Pipeline) -> list[ImageBatch]:
    """The projector on all views at once, or on each; features are held where a method behind it
    reads them."""
    keeps_features = pipeline.needs_signal("features")
    parts = [batch.signals.x_BND for batch in batches]
    if pipeline.trained_tokens:  # slots of a pool, which is float32
        parts = [part.astype(batches[0].encoded.x_BND.dtype) for part in parts]
    if host.projects_views_apart:
        x_1UD = mx.concatenate([host.project(part) for part in parts], axis=1)
    else:
        x_1UD = host.project(mx.concatenate(parts, axis=1) if len(parts) > 1 else parts[0])
    ends = accumulate([0, *(part.shape[1] for part in parts)])
    return [
        replace(
            batch,
            signals=batch.signals.replace(
                x_BND=x_1UD[:, begin:end],
                features_BND=features_BND if keeps_features else None,
                sensitivity_BN=probed(pipeline, host.project, features_BND),
            ),
        )
        for batch, features_BND, (begin, end) in zip(batches, parts, pairwise(ends), strict=True)
    ]
