"""Pruning between the language model's layers: the prompt is read from here, with fewer rows after
each cut, and mlx-vlm's loop goes on from the caches.

The prompt's last row is taken back out of the caches and left to that loop, which wants a row to
begin with; so nothing is put on the model, and what is to be known later is in the caches.

Later tokens stand at the same place in all layers. Where a paper renumbers what is left after a
cut, the rows count up to that place: rotation knows differences only.

Shapes: V pictures, n visual tokens of one at present, K kept, l rows, D features, A axes of a
position, G key/value heads, d head size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np

from ..checkpoints.errors import UserError
from ..decoder import rows as attention
from ..model import Lap, Stop
from ..pruners import Pipeline, Pruner, Reduction, Signals
from ..pruners.contract import Policy
from .host import Host
from .layers import Ahead, Layers
from .prompt import PrunedPrompt, kept_indices
from .views import View

PIECE = 2048  # rows read at once, unless the user says otherwise


@dataclass(frozen=True)
class Rows:
    """A prompt on its way through the layers."""

    x_1lD: mx.array
    place_Al: mx.array
    runs: list[tuple[int, int]]  # where each picture's rows begin, and how many there are
    deep: list[list[mx.array]]  # (n, D) of each picture, for each layer that DeepStack adds to

    def at(self, v: int) -> slice:
        begin, n = self.runs[v]
        return slice(begin, begin + n)

    @property
    def words(self) -> mx.array:
        seen = {row for begin, n in self.runs for row in range(begin, begin + n)}
        return mx.array([row for row in range(self.x_1lD.shape[1]) if row not in seen])


@dataclass(frozen=True)
class Read:
    """What mlx-vlm's loop goes on with, and what came of the prompt."""

    arguments: dict[str, Any]
    cache: list[Any]
    trace: list[Stop]
    layers: list[dict[str, Any]]  # which tokens every run of layers holds
    positions: Policy  # that held
    cache_bytes: int  # of the prompt's rows


def read(
    host: Host, prompt: PrunedPrompt, pipeline: Pipeline, budgets: Sequence[int],
    policy: Policy, piece: int | None, lap: Lap,
) -> Read | None:  # fmt: skip
    """The prompt through all layers; None where no row leaves between them.

    `budgets` are each picture's K in the average layer. `prompt` has kept places, of which
    `policy` says whether a cut leaves them.
    Raises UserError where the budget cannot be had, or the prompt ends in an image.
    """
    from mlx_vlm.models.cache import make_prompt_cache

    step, projected = pipeline.decoder, prompt.trace[-1].kept if prompt.trace else []
    if not step or all(one.slots <= K for one, K in zip(projected, budgets, strict=True)):
        return None
    layers = host.layers
    assert layers is not None, "`check` comes first"
    policy = "renumber" if prompt.positions == "renumber" else policy  # pooled: no own places
    rows, after = _begun(host, prompt, policy)
    cache = make_prompt_cache(host.language)
    schedules = _schedules(step, len(layers), [n for _, n in rows.runs], budgets)
    cuts = sorted({layer for one in schedules for layer in one})
    begin, stops, held, last = 0, [Stop("", 0, projected)], [], rows
    for cut in [*cuts, len(layers)]:
        halt = cut - (cut in cuts)  # what goes into the layer before a cut is kept
        before = through(layers, range(begin, halt), rows, cache, piece or PIECE)
        rows = through(layers, range(halt, cut), before, cache, piece or PIECE)
        lap("prefill", rows.x_1lD)
        held += [rows.x_1lD.shape[1]] * (cut - begin)
        begin, last = cut, rows
        if cut in cuts:
            at = At(layers, cut, rows, before, cache)
            kept = _cut(step, at, prompt.views, [one.get(cut) for one in schedules], lap)
            rows = _shorter(rows, kept, policy, after)
            stops.append(_stop(f"{step.name}, layer {cut}", cut, kept, stops[-1], prompt.views))
    ends = [stop.layer for stop in stops[1:]] + [len(layers)]
    runs = [_layer_run(prompt.views, *pair) for pair in zip(stops, ends, strict=True)]
    size = sum(_bytes(one, n) for one, n in zip(cache, held, strict=True))
    cache = [_without_last(layers, one, after - n) for one, n in zip(cache, held, strict=True)]
    return Read(_last_row(prompt, last, layers, after), cache, stops[1:], runs, policy, size)


def _schedules(
    step: Pruner, layers: int, sizes: Sequence[int], budgets: Sequence[int]
) -> list[Mapping[int, int]]:
    """How many tokens of each picture stay from which layer on."""
    return [
        step.ask(step.method.schedule, layers, n, K) if n > K else {}
        for n, K in zip(sizes, budgets, strict=True)
    ]


def _begun(host: Host, prompt: PrunedPrompt, policy: Policy) -> tuple[Rows, int]:
    """The rows as they go into the first layer, and where the next token will stand."""
    given = dict(prompt.arguments)
    place, delta, deep = (
        given.pop(name, None) for name in ("position_ids", "rope_deltas", "deepstack_visual_embeds")
    )
    ids_1l, pixels = given.pop("input_ids"), given.pop("pixel_values", None)
    features = host.model.get_input_embeddings(ids_1l, pixels, **given)
    if place is None:
        place, delta = features.position_ids, features.rope_deltas
    x_1lD = features.inputs_embeds
    ids, l = ids_1l[0].tolist(), x_1lD.shape[1]  # noqa: E741
    placeholder = host.image_token_id(prompt.inputs)
    if ids[-1] == placeholder:
        raise UserError("the prompt ends in an image; between layers, words judge it: add some")
    at, runs = [i for i, token in enumerate(ids) if token == placeholder], list[tuple[int, int]]()
    for one in prompt.trace[-1].kept:
        runs.append((at[sum(n for _, n in runs)], one.slots))
    ends = np.cumsum([0, *(n for _, n in runs)]).tolist()
    parts = [[y[a:b] for a, b in pairwise(ends)] for y in deep or []]
    if place is not None:
        return Rows(x_1lD, place[:, 0], runs, parts), l + int(delta.item())
    kept = prompt.kept_rows if policy == "keep" else range(l)
    after = len(prompt.inputs.ids) if policy == "keep" else l
    return Rows(x_1lD, mx.array([list(kept)]), runs, parts), after


def through(layers: Layers, numbers: range, rows: Rows, cache: list[Any], piece: int) -> Rows:
    """The rows after some layers. A long prompt is read in pieces, each by all of them."""
    if not numbers:
        return rows
    done = []
    for begin in range(0, rows.x_1lD.shape[1], piece):
        own = slice(begin, begin + piece)
        x_1lD, place_Al = rows.x_1lD[:, own], rows.place_Al[:, own]
        for number in numbers:
            x_1lD = layers.run(number, x_1lD, place_Al, cache[number])
            if number < len(rows.deep):
                x_1lD = x_1lD + _deep(rows, number)[:, own]
        mx.eval(x_1lD, [cache[number].state for number in numbers])
        done.append(x_1lD)
    return replace(rows, x_1lD=mx.concatenate(done, axis=1))


def _deep(rows: Rows, number: int) -> mx.array:
    """What DeepStack adds behind a layer, (1, l, D): nothing to words."""
    added = mx.zeros_like(rows.x_1lD)
    for v, y_nD in enumerate(rows.deep[number]):
        added[0, rows.at(v)] = y_nD.astype(added.dtype)
    return added


class At:
    """The input of a layer, and what can be known there of each picture."""

    def __init__(self, layers: Layers, layer: int, rows: Rows, before: Rows, cache: list[Any]):
        self.layers, self.rows, self.before_rows, self.cache = layers, rows, before, cache
        self.this, self.last = layer, layer - 1

    def signals(self, v: int, pruner: Pruner, grid: tuple[int, int]) -> Signals:
        """A picture's rows, and what the method needs."""
        needed: dict[str, Any] = {}
        for name in pruner.method.needs:
            needed |= SIGNALS[name](self, self.rows.at(v))
        return Signals(self.rows.x_1lD[:, self.rows.at(v)], grid, **needed)

    def before(self, own: slice) -> dict[str, mx.array]:
        return {"before_BND": self.before_rows.x_1lD[:, own]}

    def normed(self, own: slice) -> dict[str, mx.array]:
        y_1lD, words = self.layers.norm(self.rows.x_1lD), self.rows.words
        real_BT = mx.ones((1, len(words)), mx.bool_)
        return {"normed_BND": y_1lD[:, own], "text_BTD": y_1lD[:, words], "text_real_BT": real_BT}

    def held_keys(self, own: slice) -> dict[str, mx.array]:
        keys_1lD = self._held_keys().swapaxes(1, 2).flatten(2)
        return {"keys_BND": keys_1lD[:, own], "text_keys_BTD": keys_1lD[:, self.rows.words]}

    def last_attention(self, own: slice) -> dict[str, mx.array]:
        """Of the prompt's last token, in the layer before."""
        x_11D, place_A1 = self.before_rows.x_1lD[:, -1:], self.rows.place_Al[:, -1:]
        q = self.layers.queries(self.last, x_11D, place_A1)
        return {"last_attention_BN": self._attention(q, self._held_keys())[:, own]}

    def next_attention(self, own: slice) -> dict[str, mx.array]:
        """Of the prompt's last token, by this layer's own projections."""
        x_1lD, place_Al = self.rows.x_1lD, self.rows.place_Al
        q = self.layers.queries(self.this, x_1lD[:, -1:], place_Al[:, -1:])
        k = self.layers.keys(self.this, x_1lD, place_Al)
        return {"next_attention_BN": self._attention(q, k)[:, own]}

    def _held_keys(self) -> mx.array:
        """(1, G, l, d)."""
        return self.cache[self.last].state[0]

    def _attention(self, q_1GR1d: mx.array, k_1Gld: mx.array) -> mx.array:
        """(1, l): the last row sees all."""
        everywhere = mx.ones((1, 1, k_1Gld.shape[2]), mx.bool_)
        return attention(q_1GR1d, k_1Gld, everywhere, None)[:, 0]


SIGNALS = {
    name: getattr(At, name)
    for name in ("before", "normed", "held_keys", "last_attention", "next_attention")
}


def _cut(
    step: Pruner, at: At, views: Sequence[View], counts: Sequence[int | None], lap: Lap
) -> list[Reduction]:
    """What stays of each picture; one without a cut here stays whole."""
    kept = []
    for v, (view, K) in enumerate(zip(views, counts, strict=True)):
        n = at.rows.runs[v][1]
        K = n if K is None else min(K, n)
        grid = view.signals.grid
        needed = K and n > K
        bare = Signals(at.rows.x_1lD[:, at.rows.at(v)], grid)
        kept.append(lap("pruner", step(at.signals(v, step, grid) if needed else bare, K)))
    return kept


def _stop(
    name: str, layer: int, kept: Sequence[Reduction], before: Stop, views: Sequence[View]
) -> Stop:
    """What is left of the whole pictures."""
    pairs = zip(kept, before.kept, views, strict=True)
    return Stop(name, layer, [a.after(b, v.signals.x_BND.shape[1]) for a, b, v in pairs])


def _shorter(rows: Rows, kept: Sequence[Reduction], policy: Policy, after: int) -> Rows:
    """The rows that stay, at the places they had or counted up to the next."""
    x, place, runs, cursor, at = [], [], [], 0, 0
    for v, one in enumerate(kept):
        own = rows.at(v)
        assert one.index_BK is not None, "in the decoder every slot has its anchor"
        x += [rows.x_1lD[:, cursor : own.start], one.tokens(rows.x_1lD[:, own])]
        place += [rows.place_Al[:, cursor : own.start], rows.place_Al[:, own][:, one.index_BK[0]]]
        at += own.start - cursor
        runs.append((at, one.slots))
        at, cursor = at + one.slots, own.stop
    x_1lD = mx.concatenate([*x, rows.x_1lD[:, cursor:]], axis=1)
    place_Al = mx.concatenate([*place, rows.place_Al[:, cursor:]], axis=1)
    if policy == "renumber":
        l = x_1lD.shape[1]  # noqa: E741
        place_Al = mx.broadcast_to(mx.arange(after - l, after), place_Al.shape)
    deep = [[k.apply(y[None])[0] for k, y in zip(kept, ys, strict=True)] for ys in rows.deep]
    return Rows(x_1lD, place_Al, runs, deep)


def _without_last(layers: Layers, cache: Any, by: int) -> Any:
    """A cache without the prompt's last row, where layers count ahead by the rows it lacks."""
    cache.trim(1)
    return Ahead(cache, by) if layers.axes == 1 and by else cache


def _last_row(prompt: PrunedPrompt, last: Rows, layers: Layers, after: int) -> dict[str, Any]:
    """mlx-vlm's arguments for the prompt's last row."""
    more: Mapping[str, Any] = {}
    if layers.axes == 3:
        more = {
            "position_ids": last.place_Al[:, None, -1:],
            "rope_deltas": mx.array([[after - prompt.length]]),
        }
    ids_11 = prompt.arguments["input_ids"][:, -1:]
    return {"input_ids": ids_11, "mask": mx.ones((1, 1), mx.int32), **more}


def _bytes(cache: Any, rows: int) -> int:
    return sum(a.nbytes // a.shape[2] * rows for a in cache.state)


def _layer_run(views: Sequence[View], stop: Stop, end: int) -> dict[str, Any]:
    """What a run of layers holds."""
    images = 1 + max(view.image for view in views)
    return {
        "first": stop.layer,
        "last": end - 1,
        "visual_tokens": sum(one.slots for one in stop.kept),
        "kept_indices": kept_indices(views, stop, images),
    }
