"""A prompt read by a model of mlx-vlm's, through cuts between its language model's layers.

Without cuts mlx-vlm's own loop reads the prompt. With cuts it is read from here, layer by layer,
and mlx-vlm's loop goes on from the caches. That loop begins with a row, so the prompt's last row is
removed from the caches and left to it. Nothing is put on the model.

Shapes: B prompts (1 here), l rows of it, L new tokens, A position axes, D features, V words.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import mlx.core as mx
from mlx.utils import tree_reduce

from ..checkpoints.errors import UserError
from ..models.decoder import Cuts, Decoder
from ..models.splice import Spliced
from ..pruners import Pipeline
from ..pruners.contract import Policy
from .biased_cache import add_biases, with_repeated_rows
from .dropped_rows import deepstack_rows, holds_rows
from .host import Host
from .language_layers import LanguageLayers, ShiftedCache
from .prompt import PrunedPrompt


def prefill_through_cuts(
    host: Host, prompt: PrunedPrompt, pipeline: Pipeline, budgets: Sequence[int],
    policy: Policy, piece: int | None = None,
) -> PrunedPrompt:  # fmt: skip
    """The prompt, read through all layers but for its last row; as it was if no row leaves between
    layers.

    `budgets` are each view's K in the average layer. `policy` says whether rows keep their
    positions behind a cut; the prompt's must be kept ones. `piece` is how many rows are read at
    once. Raises UserError where the budget cannot be had, or the prompt ends in an image.
    """
    step = pipeline.decoder
    if not step or not prompt.trace.steps:
        return prompt
    sizes = [reduction.slots for reduction in prompt.trace.steps[-1].reductions]
    if all(n <= K for n, K in zip(sizes, budgets, strict=True)):
        return prompt
    language, policy = _layers(host, prompt), prompt.trace.policy(policy)
    spliced = _splice(host, prompt, sizes, policy)
    schedules = [
        step.call(step.method.schedule, language.depth, n, K) if n > K else {}
        for n, K in zip(sizes, budgets, strict=True)
    ]
    cuts = Cuts(step, schedules, [view.signals.grid for view in prompt.views], policy)
    decoder = Decoder(language, language.make_cache(), cuts, prefill_step_size=piece)
    decoded = decoder(spliced)
    caches = [with_repeated_rows(cache) for cache in decoder.cache]
    nbytes = prompt_cache_bytes(caches)  # before the last rows leave, and all repeated ones
    first, stored = decoder.cache[0], caches[0]
    repeated = 0 if stored is first else stored.offset - first.offset
    position = _next_position(prompt, policy)
    return replace(
        prompt,
        arguments=_last_row_arguments(prompt, decoded.spliced, language, repeated),
        cache_bytes=nbytes,
        cache=[_without_last_row(language, cache, position) for cache in caches],
        trace=prompt.trace.after_cuts(step.name, decoded.reductions),
        positions=policy,
    )


def _layers(host: Host, prompt: PrunedPrompt) -> LanguageLayers:
    """The language model's layers. Raises UserError for a prompt that is too long for them."""
    layers = host.language_layers
    assert layers is not None, "`check_pipeline` comes first"
    if layers.window and prompt.length >= layers.window:
        raise UserError(
            f"the prompt has {prompt.length} rows, and layers of this {host.kind} model hold the"
            f" last {layers.window}: between them shorter prompts are pruned only"
        )
    return layers


def _splice(host: Host, prompt: PrunedPrompt, sizes: Sequence[int], policy: Policy) -> Spliced:
    """The rows as the first layer takes them; `sizes` are the visual tokens of each view."""
    arguments = dict(prompt.arguments)
    names = ("input_ids", "pixel_values", "position_ids", "rope_deltas", "deepstack_visual_embeds")
    ids_1l, pixels, positions_A1l, delta, deepstack = (arguments.pop(n, None) for n in names)
    features = host.stock_embeddings(ids_1l, pixels, **arguments)
    if positions_A1l is None:
        positions_A1l, delta = features.position_ids, features.rope_deltas
    x_1lD = _layers(host, prompt).enter(features.inputs_embeds)
    ids, placeholder = ids_1l[0].tolist(), host.image_token_id(prompt.inputs)
    if ids[-1] == placeholder:
        raise UserError("the prompt ends in an image; between layers, words judge it: add some")
    length = len(ids)
    next_11 = mx.array([[_next_position(prompt, policy)]])
    if positions_A1l is not None:
        positions_1l, next_11 = positions_A1l.transpose(1, 2, 0), length + delta.reshape(1, 1)
    elif policy == "keep":
        positions_1l = prompt.kept_rows.rows_l[None]
    else:
        positions_1l = mx.arange(length)[None]
    rows = [row for row, token in enumerate(ids) if token == placeholder]
    starts = [rows[first] for first in accumulate(sizes[:-1], initial=0)]
    deep_lYD = deepstack_rows(mx.array(ids) == placeholder, deepstack, len(deepstack or []), x_1lD)
    return Spliced(
        x_1lD, positions_1l, next_11, [length],
        [list(zip(starts, sizes, strict=True))],
        added=[deep_lYD[None, :, layer] for layer in range(deep_lYD.shape[1])],
        rank_BL=_ranks(prompt, starts, length),
    )  # fmt: skip


def _ranks(prompt: PrunedPrompt, starts: Sequence[int], length: int) -> mx.array | None:
    """`cls_rank_BN` of the rows of all views, (1, l), where a method reads it."""
    ranks = [rank_1n for rank_1n in prompt.ranks if rank_1n is not None]
    if not ranks:
        return None
    rank_1l = mx.zeros((1, length))
    for start, rank_1n in zip(starts, ranks, strict=True):
        rank_1l[:, start : start + rank_1n.shape[1]] = rank_1n
    return rank_1l


def _next_position(prompt: PrunedPrompt, policy: Policy) -> int:
    """The position after the prompt along one axis."""
    return len(prompt.inputs.ids if policy == "keep" else prompt.kept_rows)


def _without_last_row(language: LanguageLayers, cache: Any, position: int) -> Any:
    """A layer's cache without the prompt's last row; `position` is that after the prompt. Layers
    that count positions by the cache must count the rows that are missing there, too."""
    missing = position - cache.offset
    cache.trim(1)
    return ShiftedCache(cache, missing) if language.axes == 1 and missing else cache


def _last_row_arguments(
    prompt: PrunedPrompt, spliced: Spliced, language: LanguageLayers, repeated: int
) -> dict[str, Any]:
    """mlx-vlm's arguments for the prompt's last row; the first layer's cache, by which positions
    are counted, has so many `repeated` rows."""
    arguments = {
        "input_ids": prompt.arguments["input_ids"][:, -1:],
        "mask": mx.ones((1, 1), mx.int32),
    }
    if language.axes == 3:
        arguments["position_ids"] = spliced.positions_BL[:, -1:].transpose(2, 0, 1)
        arguments["rope_deltas"] = spliced.next_B1 - prompt.length - repeated
    return arguments


READ_ALONE = (
    "a method between the language model's layers needs a prompt that is read alone and at once,"
    " with mlx-vlm's own caches: no batch, no server, no max_kv_size"
)


def without_embeddings(features: Any) -> Any:
    """mlx-vlm's features of a prompt that was read through cuts: NaN, if a caller reads it."""
    x_BLD = features.inputs_embeds
    return replace(features, inputs_embeds=mx.full(x_BLD.shape, mx.nan, x_BLD.dtype))


def check_not_through_cuts(x_BLD: mx.array | None) -> None:
    """Raises UserError for embeddings of a prompt that was read through cuts, in another call than
    that for all of it."""
    if x_BLD is not None and mx.isnan(x_BLD[:, -1]).all(axis=-1).any():
        raise UserError(READ_ALONE)


def last_row_call(
    prompt: PrunedPrompt, arguments: dict[str, Any]
) -> tuple[mx.array, dict[str, Any]]:
    """The call that goes on behind a prompt which was read through cuts, in place of a call for all
    of it: ids and arguments. The caller's caches become copies of the prompt's.

    Raises UserError for caches that are not those of one prompt, whole.
    """
    assert prompt.cache is not None, "it was read"
    theirs, x_BLD = arguments.get("cache"), arguments["inputs_embeds"]
    kinds = [type(getattr(cache, "cache", cache)) for cache in prompt.cache]
    is_one = len(x_BLD) == 1 and x_BLD.shape[1] == arguments["attention_mask"].shape[1]
    if not is_one or not theirs or [*map(type, theirs)] != kinds:
        raise UserError(READ_ALONE)
    theirs[:] = copy.deepcopy(prompt.cache)
    more = {**prompt.arguments, "cache": theirs}
    more.pop("mask")
    return more.pop("input_ids"), more


def prompt_cache(host: Host, prompt: PrunedPrompt, max_kv_size: int | None = None) -> list[Any]:
    """The prompt's caches, one a layer; new ones, of so many rows, where nothing was read yet."""
    from mlx_vlm.models.cache import make_prompt_cache

    cache: list[Any] = prompt.cache or make_prompt_cache(host.language, max_kv_size)
    if prompt.bias_l is not None:
        add_biases(cache, host.mask_layers, prompt.bias_l[None])
    return cache


def prompt_cache_bytes(cache: Sequence[Any], rows: float = math.inf) -> int:
    """Bytes of a prompt's rows in all layers: of so many, without the first token's, which may be
    there; or of all that there are."""
    total = 0.0
    for layer in cache:
        size = tree_reduce(lambda n, a: n + getattr(a, "nbytes", 0), layer.state, 0)
        total += size * min(1.0, rows / max(1, layer.offset)) if holds_rows(layer) else size
    return round(total)


class HostPrefill:
    """A prompt that mlx-vlm's own loop has read: the `Prefill` of `generation.prefill`."""

    def __init__(self, host: Host, prompt: PrunedPrompt):
        from mlx_vlm.generate.ar import generate_step

        self.host, self.trace, self.rows = host, prompt.trace, [prompt.length]
        self.cache = prompt_cache(host, prompt)
        arguments = dict(prompt.arguments)
        names = ("input_ids", "pixel_values", "mask")
        ids, pixels, mask = (arguments.pop(name, None) for name in names)
        first: list[mx.array] = []

        def sampler(logprobs_1V: mx.array) -> mx.array:
            first.append(logprobs_1V)
            return mx.argmax(logprobs_1V, axis=-1)

        options = {"max_tokens": 0, "sampler": sampler, "prompt_cache": self.cache}
        tokens = list(generate_step(ids, host.model, pixels, mask, **options, **arguments))
        assert not tokens and len(first) == 1
        self.logits_BV = first[0]

    def step(self, token_BL: mx.array) -> mx.array:
        """Read more tokens; logits (B, L, V) after each.

        One token a call: layers that hold different numbers of rows share no mask.
        """
        parts = [
            self.host.language(token_BL[:, i : i + 1], cache=self.cache).logits[:, -1:]
            for i in range(token_BL.shape[1])
        ]
        return mx.concatenate(parts, axis=1)

    def fork(self) -> "HostPrefill":
        """A copy, whose steps do not change this one."""
        fork = copy.copy(self)
        fork.cache = copy.deepcopy(self.cache)
        return fork
