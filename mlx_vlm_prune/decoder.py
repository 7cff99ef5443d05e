"""Prefill: prompts through the language model's layers, with fewer rows after each cut.

Scores that papers take from attention matrices come from the rows that are needed.

Shapes: B prompts, I images over all prompts, n visual tokens of an image at present,
T tokens of text, Q queries, L rows, S rows held, D features, V words, G key/value heads,
R queries of each, d head size.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx

from .cache import LayerCache
from .language.contract import Language, Layer
from .language.twig import Twig
from .pruners import Pruner, Reduction, Signals
from .pruners.contract import Policy, take
from .splice import Spliced, shorten

PIECE = 2048  # rows of a prompt read at once
ROWS = 64  # queries whose attention is held at once


@dataclass(frozen=True)
class Segment:
    """Layers that hold the same rows; a later token stands `shift` places from where it stands
    in the first ones."""

    layers: range
    padded: bool
    shift_B1: mx.array


@dataclass(frozen=True)
class Cuts:
    """Where visual rows leave: K of each image's stay from a layer on."""

    pruner: Pruner | None = None
    schedule: Mapping[int, int] = field(default_factory=dict)
    enhancer: Pruner | None = None
    policy: Policy = "keep"


@dataclass(frozen=True)
class Read:
    """What reading the prompts gave."""

    logits_BLV: mx.array
    segments: list[Segment]
    reductions: list[tuple[int, Reduction]]  # at which layer, of the rows that were left


def read(
    language: Language, told: Spliced, grid: tuple[int, int], cache: list[LayerCache],
    cuts: Cuts, last_only: bool, lap: Callable[[str, Any], Any], growth: "Growth | None" = None,
) -> Read:  # fmt: skip
    """Logits (B, L, V), or (B, 1, V) of the last word; the caches are filled, and those of a
    growth with what reached its layer, before any leave there."""
    begin, next_B1, segments, reductions = 0, told.next_B1, [], []
    for layer, K in [*sorted(cuts.schedule.items()), (len(language.layers), None)]:
        halt = layer if K is None else layer - 1  # what goes into the layer before a cut is kept
        before_BLD = past(language, range(begin, halt), told, cache, growth)
        inner = replace(told, x_BLD=before_BLD)
        x_BLD = past(language, range(halt, layer), inner, cache, growth)
        segments.append(Segment(range(begin, layer), told.padded, told.next_B1 - next_B1))
        told, begin = replace(told, x_BLD=lap("prefill", x_BLD)), layer
        if K is not None:
            assert cuts.pruner
            at = At(language, layer, told, before_BLD, cache, cuts.pruner.learned, growth)
            signals = at.signals(cuts.pruner, grid) if K else at.visual(grid)
            kept = lap("pruner", cuts.pruner(signals, K))
            reductions.append((layer, kept))
            told = shorten(told, kept, bias(cuts, told, signals, kept), cuts.policy)
    x_BLD = told.x_BLD[:, -1:] if last_only else told.x_BLD
    return Read(language.logits(x_BLD), segments, reductions)


def through(
    language: Language | Twig, numbers: range, told: Spliced, cache: list[LayerCache]
) -> mx.array:
    """Hidden states after some layers. A long prompt is read in pieces: memory must not grow
    with its square."""
    if not numbers:
        return told.x_BLD
    pieces = []
    for begin in range(0, told.x_BLD.shape[1], PIECE):
        piece = slice(begin, begin + PIECE)
        x_BLD, bias_BL = told.x_BLD[:, piece], told.bias_BL
        bias_BL = None if bias_BL is None else bias_BL[:, piece]
        places_BL = told.positions_BL[:, piece]
        options: dict[str, Any] = {"padded": told.padded, "bias_BL": bias_BL}
        pieces.append(language.run(numbers, x_BLD, places_BL, cache, **options))
        mx.eval(pieces[-1])
    return mx.concatenate(pieces, axis=1)


class Growth:
    """A twig in use: the rows it holds of a request, and what its last layer reads of the
    prompts."""

    def __init__(self, twig: Twig):
        self.twig, self.cache = twig, twig.make_cache()
        self.below_BLD: mx.array | None = None

    def below(self, told: Spliced) -> mx.array:
        """What its last layer reads; the layers under it run once."""
        if self.below_BLD is None:
            self.below_BLD = through(self.twig, range(self.last), told, self.cache)
        return self.below_BLD

    def read(self, told: Spliced) -> None:
        """The prompts, as they are at its layer. Nobody asks what the last layer makes of them,
        so MLX computes its keys and values and nothing else."""
        options: dict[str, Any] = {"padded": told.padded, "bias_BL": told.bias_BL}
        last, x_BLD = range(self.last, self.last + 1), self.below(told)
        self.twig.run(last, x_BLD, told.positions_BL, self.cache, **options)
        held = self.cache[self.last]
        mx.eval(held.keys_BGSd, held.values_BGSd)

    @property
    def last(self) -> int:
        return len(self.twig.layers) - 1


def past(
    language: Language, numbers: range, told: Spliced, cache: list[LayerCache],
    growth: Growth | None,
) -> mx.array:  # fmt: skip
    """`through`; where a twig grows on the way, it reads what goes past."""
    if growth and numbers.start < growth.twig.layer <= numbers.stop:
        lower = range(numbers.start, growth.twig.layer)
        told = replace(told, x_BLD=through(language, lower, told, cache))
        growth.read(told)
        numbers = range(growth.twig.layer, numbers.stop)
    return through(language, numbers, told, cache)


def bias(cuts: Cuts, told: Spliced, signals: Signals, kept: Reduction) -> mx.array | None:
    """What is added to the attention that kept rows get, (I, K): merged rows speak for all
    their members, and so do kept ones with an enhancer."""
    assert cuts.pruner and kept.index_BK is not None
    held_BL = mx.zeros(told.positions_BL.shape) if told.bias_BL is None else told.bias_BL
    bias_IN = held_BL[told.where]
    if cuts.enhancer and kept.slots:
        added = cuts.enhancer.ask(cuts.enhancer.method.weigh, signals, kept)
        return take(bias_IN, kept.index_BK) + added
    if cuts.pruner.is_proportional:
        members_IKN = (kept.mixture(bias_IN.shape[1]) > 0).astype(mx.float32)
        return mx.log((members_IKN @ mx.exp(bias_IN)[..., None])[..., 0])
    return None if told.bias_BL is None else take(bias_IN, kept.index_BK)


class At:
    """The input of a layer, and what can be known there."""

    def __init__(
        self, language: Language, layer: int, told: Spliced, before_BLD: mx.array,
        cache: list[LayerCache], twig: Twig | None = None, growth: Growth | None = None,
    ):  # fmt: skip
        self.language, self.told, self.before_BLD, self.twig = language, told, before_BLD, twig
        self.growth = growth
        self.this, self.last = language.layers[layer], language.layers[layer - 1]
        self.held = cache[layer - 1]
        self.image_I1, self.columns_IN = told.where

    def visual(self, grid: tuple[int, int]) -> Signals:
        """The visual rows of all images."""
        return Signals(self.told.x_BLD[self.told.where], grid)

    def signals(self, pruner: Pruner, grid: tuple[int, int]) -> Signals:
        """The same, and what the method needs."""
        found: dict[str, Any] = {}
        for name in pruner.method.needs:
            found |= getattr(self, name)()
        return self.visual(grid).replace(**found)

    def before(self) -> dict[str, mx.array]:
        return {"before_BND": self.before_BLD[self.told.where]}

    def normed(self) -> dict[str, mx.array]:
        """Hidden states as the final norm leaves them, of images and text."""
        columns_BT, real_BT = self.told.text(images=True)
        prompt_I1 = self.image_I1
        norm = self.language.norm
        return {
            "normed_BND": norm(self.told.x_BLD[self.told.where]),
            "text_BTD": norm(self.told.x_BLD[prompt_I1, columns_BT]),
            "text_real_BT": real_BT,
        }

    def held_keys(self) -> dict[str, mx.array]:
        """Keys that the layer before holds, of images and text."""
        keys_BSD = self._held_keys().swapaxes(1, 2).flatten(2)
        columns_IT, _ = self.told.text(images=True)
        return {
            "keys_BND": keys_BSD[self.told.where],
            "text_keys_BTD": keys_BSD[self.image_I1, columns_IT],
        }

    def last_attention(self) -> dict[str, mx.array]:
        """Of the prompt's last token, in the layer before."""
        rows_IQN = self._attention(mx.full((len(self.told.lengths), 1), self._L - 1))
        return {"last_attention_BN": rows_IQN[:, 0]}

    def text_attention(self) -> dict[str, mx.array]:
        """Of every token of text, in the layer before."""
        columns_BT, _ = self.told.text(images=False)
        parts = [
            self._attention(columns_BT[:, begin : begin + ROWS])
            for begin in range(0, columns_BT.shape[1], ROWS)
        ]
        return {"text_attention_BTN": mx.concatenate(parts, axis=1)}

    def next_attention(self) -> dict[str, mx.array]:
        """Of the prompt's last token, by this layer's own projections."""
        return {"next_attention_BN": self._coming(self.this, self.told.x_BLD)}

    def twig_attention(self) -> dict[str, mx.array]:
        """Of the prompt's last token, in the last layer of the twig that grows here; of that
        layer nothing else is computed."""
        assert self.twig is not None, "the method brings its twig"
        growth = self.growth
        if growth is None or growth.twig is not self.twig:
            growth = Growth(self.twig)
        return {"twig_attention_BN": self._coming(self.twig.layers[-1], growth.below(self.told))}

    def mean_attention(self) -> dict[str, mx.array]:
        """Of the mean visual query to the visual keys, by this layer's own projections."""
        attend, where = self.this.self_attn, self.told.where
        x_IND = self.this.input_layernorm(self.told.x_BLD[where])
        rotary = self.language.rotary(self.told.positions_BL[where])
        q_IGR1d = attend.grouped_queries(x_IND, rotary).mean(axis=3, keepdims=True)
        k_IGNd = attend.turned_keys(x_IND, rotary)
        everywhere = mx.ones((len(x_IND), 1, x_IND.shape[1]), dtype=mx.bool_)
        return {
            "mean_attention_BN": rows(q_IGR1d, k_IGNd, everywhere, None)[:, 0],
            "next_keys_BND": k_IGNd.swapaxes(1, 2).flatten(2),
        }

    def _coming(self, layer: Layer, x_BLD: mx.array) -> mx.array:
        """What the prompt's last token attends to in a layer with the input x, (I, n)."""
        attend, x_BLD = layer.self_attn, layer.input_layernorm(x_BLD)
        places_BL = self.told.positions_BL
        q = attend.grouped_queries(x_BLD[:, -1:], self.language.rotary(places_BL[:, -1:]))
        k = attend.turned_keys(x_BLD, self.language.rotary(places_BL))
        rows_BQS = rows(q, k, self._visible(places_BL[:, -1:]), self.told.bias_BL)
        return rows_BQS[self.image_I1, 0, self.columns_IN]

    @property
    def _L(self) -> int:
        return self.told.x_BLD.shape[1]

    def _held_keys(self) -> mx.array:
        assert self.held.keys_BGSd is not None
        return self.held.keys_BGSd[:, :, : self.held.rows]

    def _visible(self, places_BQ: mx.array) -> mx.array:
        seen_B1S = self.told.positions_BL[:, None]
        return (seen_B1S >= 0) & (seen_B1S <= places_BQ[..., None])

    def _attention(self, columns_BQ: mx.array) -> mx.array:
        """What rows at some columns attend to in the layer before, (I, Q, n)."""
        prompts_B1 = mx.arange(len(columns_BQ))[:, None]
        places_BQ = self.told.positions_BL[prompts_B1, columns_BQ]
        x_BQD = self.last.input_layernorm(self.before_BLD[prompts_B1, columns_BQ])
        q = self.last.self_attn.grouped_queries(x_BQD, self.language.rotary(places_BQ))
        rows_BQS = rows(q, self._held_keys(), self._visible(places_BQ), self.told.bias_BL)
        return take(rows_BQS[self.image_I1[:, 0]], self.columns_IN, axis=2)


def rows(
    q_BGRQd: mx.array, k_BGSd: mx.array, visible_BQS: mx.array, bias_BS: mx.array | None
) -> mx.array:
    """What Q queries attend to, mean over heads, (B, Q, S) float32."""
    logits = (q_BGRQd @ k_BGSd[:, :, None].swapaxes(3, 4)).astype(mx.float32)
    logits = logits * k_BGSd.shape[-1] ** -0.5
    if bias_BS is not None:
        logits = logits + bias_BS[:, None, None, None]
    logits = mx.where(visible_BQS[:, None, None], logits, -mx.inf)
    return mx.softmax(logits, axis=-1).mean(axis=(1, 2))
