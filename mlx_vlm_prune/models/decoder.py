"""Prefill: prompts through the language model's layers; at each cut a method chooses the rows.

Scores that papers take from attention matrices come from the rows that are needed.

Shapes: B prompts, I images of a group, n visual tokens of an image at present, K kept of them,
T tokens of the longest text, Q queries, L rows, S rows held, D features, V words, G key/value
heads, R queries of each, d head size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import mlx.core as mx

from ..machine.clock import end_part
from ..pruners import Pruner, Reduction, Signals
from ..pruners.contract import Policy, identity, take
from .cache import HeldRows
from .entry_bias import with_entry_bias, without_entry_bias
from .language.contract import Language, Layers
from .layers import Observers, TwigReader, attention, run_layers
from .splice import Spliced, drop_rows, pad_right

QUERY_CHUNK = 64  # queries whose attention is held at once


@dataclass(frozen=True)
class Cuts:
    """Where visual rows leave: from a layer on, K of an image's stay.

    `schedules` has {layer: K} of every image; `grids` its rows and columns of visual tokens.
    `twig` is the one whose attention the method reads.
    """

    pruner: Pruner | None = None
    schedules: Sequence[Mapping[int, int]] = ()
    grids: Sequence[tuple[int, int]] = ()
    policy: Policy = "keep"
    enhancer: Pruner | None = None
    twig: "TwigReader | None" = None

    @property
    def layers(self) -> list[int]:
        return sorted({layer for schedule in self.schedules for layer in schedule})


@dataclass(frozen=True)
class Decoded:
    """Prompts that went through all layers."""

    spliced: Spliced  # the rows after the last layer
    reductions: list[tuple[int, list[Reduction]]]  # (layer, what the cut left of every image)
    rows: list[int]  # of the longest prompt, in each layer


@dataclass(frozen=True)
class Decoder:
    """A pass through a language model's layers, whose caches it fills.

    `observers` are called with the input of a layer, before any row leaves there.
    `prefill_step_size` is how many rows are read at once (default: PREFILL_STEP_SIZE).
    """

    language: Language
    cache: list[Any]
    cuts: Cuts = field(default_factory=Cuts)
    observers: Observers = field(default_factory=dict)
    prefill_step_size: int | None = None

    def __call__(self, spliced: Spliced) -> Decoded:
        """Read the prompts; rows leave between the layers."""
        depth, begin, reductions, rows = self.language.depth, 0, [], list[int]()
        entry, cuts = spliced, self.cuts
        spliced = with_entry_bias(spliced, cuts.pruner, cuts.schedules, cuts.grids)
        if spliced.distance_BP is not None:
            before_prompt = HeldRows(distance_BP=spliced.distance_BP)
            for layer_cache in self.cache:
                layer_cache.held = before_prompt
        for layer in self.cuts.layers:
            before = self._read(range(begin, layer - 1), spliced)
            spliced = self._read(range(layer - 1, layer), before)
            end_part("prefill", spliced.x_BLD)
            rows += [spliced.L] * (layer - begin)
            spliced, kept = self._cut(layer, spliced, before.x_BLD, entry)
            if not cuts.enhancer:
                spliced = without_entry_bias(spliced, entry, cuts.pruner)
            reductions.append((layer, kept))
            begin = layer
        spliced = self._read(range(begin, depth), spliced)
        rows += [spliced.L] * (depth - begin)
        if spliced.distance_BP is not None:
            for layer_cache in self.cache:
                layer_cache.held = layer_cache.held.unbiased()
        return Decoded(spliced, reductions, rows)

    def _read(self, layers: range, spliced: Spliced) -> Spliced:
        """Through some layers; the observers of each see its input."""
        begin = layers.start
        for layer in sorted(self.observers):
            if layers.start < layer <= layers.stop:
                spliced = self._read_unobserved(range(begin, layer), spliced)
                self.observers[layer](spliced)
                begin = layer
        return self._read_unobserved(range(begin, layers.stop), spliced)

    def _read_unobserved(self, layers: range, spliced: Spliced) -> Spliced:
        """Through some layers, with what DeepStack adds behind the first ones."""
        with_added = layers[: max(0, len(spliced.added) - layers.start)]
        for layer in with_added:
            x_BLD = self._run(range(layer, layer + 1), spliced)
            spliced = replace(spliced, x_BLD=x_BLD + spliced.added[layer].astype(x_BLD.dtype))
        return replace(spliced, x_BLD=self._run(layers[len(with_added) :], spliced))

    def _run(self, layers: range, spliced: Spliced) -> mx.array:
        return run_layers(self.language, layers, spliced, self.cache, self.prefill_step_size)

    def _cut(
        self, layer: int, spliced: Spliced, before_BLD: mx.array, entry: Spliced
    ) -> tuple[Spliced, list[Reduction]]:
        """The rows that stay from a layer on; images with the same n and K are reduced together."""
        groups: dict[tuple[int, int, tuple[int, int]], list[int]] = {}
        for image, columns in enumerate(spliced.image_columns):
            n, schedule = len(columns), self.cuts.schedules[image]
            K = min(schedule.get(layer, n), n)
            groups.setdefault((n, K, self.cuts.grids[image]), []).append(image)
        reductions = [Reduction() for _ in spliced.image_columns]
        biases: list[mx.array | None] = [None for _ in reductions]
        for (n, K, grid), group in groups.items():
            layer_input = LayerInput(self, layer, spliced, before_BLD, group, grid, entry)
            reduction, bias_IK = self._reduce(layer_input, n, K)
            for i, image in enumerate(group):
                reductions[image] = reduction.of_image(i)
                biases[image] = None if bias_IK is None else bias_IK[i]
        return drop_rows(spliced, reductions, biases, self.cuts.policy), reductions

    def _reduce(
        self, layer_input: "LayerInput", n: int, K: int
    ) -> tuple[Reduction, mx.array | None]:
        """What stays of a group's n rows each, and what is added to the attention they get."""
        pruner = self.cuts.pruner
        assert pruner is not None
        if n == K:
            return identity(layer_input.visual().x_BND), layer_input.bias_IN()
        signals = layer_input.signals(pruner) if K else layer_input.visual()
        kept = end_part("pruner", pruner(signals, K))
        return kept, layer_input.bias_of(kept, signals)


class LayerInput:
    """The input of a layer, and the signals there of a group of images with n rows each.

    The methods `before` to `mean_attention` have the names by which a pruner `needs` them.
    """

    def __init__(
        self, decoder: Decoder, layer: int, spliced: Spliced, before_BLD: mx.array,
        images: Sequence[int], grid: tuple[int, int], entry: Spliced | None = None,
    ):  # fmt: skip
        self.language, self.cuts = decoder.language, decoder.cuts
        self.layer, self.cache_before = layer, decoder.cache[layer - 1]
        self.spliced, self.before_BLD, self.grid = spliced, before_BLD, grid
        self.entry = spliced if entry is None else entry  # the input of the first layer
        self.images, self.prompts = images, [spliced.prompt_of[i] for i in images]
        columns = [list(spliced.image_columns[i]) for i in images]
        self.prompt_I1 = mx.array(self.prompts)[:, None]
        self.columns_IN = mx.array(columns, dtype=mx.int32).reshape(len(images), -1)

    def of_images(self, x_BLD: mx.array) -> mx.array:
        """The images' rows, (I, n, …)."""
        return x_BLD[self.prompt_I1, self.columns_IN]

    def visual(self) -> Signals:
        """The visual rows alone."""
        return Signals(self.of_images(self.spliced.x_BLD), self.grid)

    def signals(self, pruner: Pruner) -> Signals:
        """The visual rows, and what the method needs."""
        signals: dict[str, Any] = {}
        for name in sorted(pruner.needs):
            signals |= getattr(self, name)()
        return self.visual().replace(**signals)

    @cached_property
    def text_columns(self) -> tuple[mx.array, mx.array]:
        """Columns (I, T) of the words after each image, and which are real."""
        return self._words_after_images(self.spliced)

    def _words_after_images(self, spliced: Spliced) -> tuple[mx.array, mx.array]:
        """The same in other rows of the prompts; of an image at the end, of all words."""
        columns = []
        for image, prompt in zip(self.images, self.prompts, strict=True):
            words, end = spliced.word_columns[prompt], spliced.image_columns[image].stop
            columns.append([column for column in words if column >= end] or words)
        return pad_right(columns, spliced.L - 1)

    def bias_IN(self) -> mx.array | None:
        """What is added to the attention that the images' rows get."""
        bias_BL = self.spliced.bias_BL
        return None if bias_BL is None else self.of_images(bias_BL)

    def bias_of(self, kept: Reduction, signals: Signals) -> mx.array | None:
        """The same of kept rows, (I, K): merged rows stand for all their members, and so do kept
        ones with an enhancer."""
        pruner, enhancer, bias_IN = self.cuts.pruner, self.cuts.enhancer, self.bias_IN()
        assert pruner and kept.index_BK is not None
        n = self.columns_IN.shape[1]
        before_IN = mx.zeros((len(self.images), n)) if bias_IN is None else bias_IN
        if enhancer and kept.slots:
            added_IK = enhancer.call(enhancer.method.attention_bias, signals, kept)
            return take(before_IN, kept.index_BK) + added_IK
        if pruner.is_proportional:
            return mx.log(kept.sizes(mx.exp(before_IN)))
        return None if bias_IN is None else take(bias_IN, kept.index_BK)

    def cls_rank(self) -> dict[str, mx.array]:
        assert self.spliced.rank_BL is not None, "the host hands it over"
        return {"cls_rank_BN": self.of_images(self.spliced.rank_BL)}

    def entrance(self) -> dict[str, mx.array]:
        return {"entrance_BND": self.of_images(self.entry.x_BLD)}  # none has left since

    def before(self) -> dict[str, mx.array]:
        return {"before_BND": self.of_images(self.before_BLD)}

    def normed(self) -> dict[str, mx.array]:
        """Hidden states as the final norm leaves them, of images and the words after them."""
        x_BLD, norm = self.spliced.x_BLD, self.language.norm
        columns_IT, is_real_IT = self.text_columns
        return {
            "normed_BND": norm(self.of_images(x_BLD)),
            "text_BTD": norm(x_BLD[self.prompt_I1, columns_IT]),
            "text_real_BT": is_real_IT,
        }

    def text_share(self) -> dict[str, mx.array]:
        """Of the words after each image their shares of a softmax over them, the mean over the
        image's tokens, by products of embeddings where they enter the first layer."""
        columns_IT, is_real_IT = self._words_after_images(self.entry)
        images = [list(self.entry.image_columns[image]) for image in self.images]
        columns_IN, is_token_IN = pad_right(images, self.entry.L - 1)
        x_BLD = self.entry.x_BLD.astype(mx.float32)
        x_IND, words_ITD = x_BLD[self.prompt_I1, columns_IN], x_BLD[self.prompt_I1, columns_IT]
        logits_INT = x_IND @ words_ITD.swapaxes(1, 2)
        share_INT = mx.softmax(mx.where(is_real_IT[:, None], logits_INT, -mx.inf), axis=-1)
        share_IT = (share_INT * is_token_IN[..., None]).sum(axis=1)
        share_IT = share_IT / is_token_IN.sum(axis=1, keepdims=True)
        return {"text_share_BT": share_IT, "text_real_BT": is_real_IT}

    def held_keys(self) -> dict[str, mx.array]:
        """Keys that the layer before holds, of images and the words after them."""
        keys_BSD = self.language.held_keys(self.cache_before).swapaxes(1, 2).flatten(2)
        text_keys_ITD = keys_BSD[self.prompt_I1, self.text_columns[0]]
        return {"keys_BND": self.of_images(keys_BSD), "text_keys_BTD": text_keys_ITD}

    def held_values(self) -> dict[str, mx.array]:
        """Values that the layer before holds, of images and the words after them."""
        values_BSHd = self.language.held_values(self.cache_before).swapaxes(1, 2)
        columns_IT, is_real_IT = self.text_columns
        words = {"text_values_BTHd": values_BSHd[self.prompt_I1, columns_IT]}
        images = {"held_values_BNHd": self.of_images(values_BSHd)}
        return {**images, **words, "text_real_BT": is_real_IT}

    def rotation(self) -> dict[str, mx.array]:
        """What this layer's rotary embedding makes of the images' positions."""
        positions_IN = self.of_images(self.spliced.positions_BL)
        means = self.language.mean_rotation(self.layer, positions_IN)
        return dict(zip(("rotary_cosine_BN", "rotary_sine_BN"), means, strict=True))

    def last_attention(self) -> dict[str, mx.array]:
        """Of the prompt's last token, in the layer before."""
        columns_I1 = mx.full((len(self.images), 1), self.spliced.L - 1)
        return {"last_attention_BN": self._attention_before(columns_I1)[:, 0]}

    def text_attention(self) -> dict[str, mx.array]:
        """Of every word after the image, in the layer before."""
        columns_IT, is_real_IT = self.text_columns
        chunks = range(0, columns_IT.shape[1], QUERY_CHUNK)
        parts = [self._attention_before(columns_IT[:, t : t + QUERY_CHUNK]) for t in chunks]
        rows_ITN = mx.concatenate(parts, axis=1)
        return {"text_attention_BTN": rows_ITN, "text_real_BT": is_real_IT}

    def next_attention(self) -> dict[str, mx.array]:
        """Of the prompt's last token, by this layer's own projections."""
        x_BLD = self.spliced.x_BLD
        return {"next_attention_BN": self._attention_next(self.language, self.layer, x_BLD)}

    def twig_attention(self) -> dict[str, mx.array]:
        """Of the prompt's last token, in the last layer of the twig that grows here; of that
        layer nothing else is computed."""
        twig = self.cuts.twig
        assert twig is not None, "the method brings its twig"
        row_IN = self._attention_next(twig.twig, twig.last, twig.last_input(self.spliced))
        return {"twig_attention_BN": row_IN}

    def mean_attention(self) -> dict[str, mx.array]:
        """Of the mean visual query to the visual keys, all at position 0: not rotated; the same of
        the mean query of all rows up to the prompt's last visual token, to their keys."""
        x_IND, positions_IN = map(self.of_images, (self.spliced.x_BLD, self.spliced.positions_BL))
        q_IGRNd = self.language.rotated_queries(self.layer, x_IND, positions_IN * 0)
        at_0_IGNd = self.language.rotated_keys(self.layer, x_IND, positions_IN * 0)
        k_IGNd = self.language.rotated_keys(self.layer, x_IND, positions_IN)
        everywhere = mx.ones((len(x_IND), 1, x_IND.shape[1]), dtype=mx.bool_)
        row_I1N = attention(q_IGRNd.mean(axis=3, keepdims=True), at_0_IGNd, everywhere, None)
        return {
            "mean_attention_BN": row_I1N[:, 0],
            "prompt_attention_BN": self._prompt_attention(),
            "next_keys_BND": k_IGNd.swapaxes(1, 2).flatten(2),
        }

    def _prompt_attention(self) -> mx.array:
        prompt_I, spliced = self.prompt_I1[:, 0], self.spliced
        pairs = [*zip(spliced.prompt_of, spliced.image_columns, strict=True)]
        ends = [max(c.stop for p, c in pairs if p == prompt) for prompt in self.prompts]
        is_ahead_IL = mx.arange(spliced.L) < mx.array(ends)[:, None]
        is_ahead_IL = is_ahead_IL & spliced.is_real_BL[prompt_I]
        x_ILD, nowhere_IL = spliced.x_BLD[prompt_I], spliced.positions_BL[prompt_I] * 0
        q_IGRLd = self.language.rotated_queries(self.layer, x_ILD, nowhere_IL)
        k_IGLd = self.language.rotated_keys(self.layer, x_ILD, nowhere_IL)
        share_IL = is_ahead_IL / is_ahead_IL.sum(axis=1, keepdims=True)
        mean_IGR1d = share_IL[:, None, None, None] @ q_IGRLd.astype(mx.float32)
        row_I1L = attention(mean_IGR1d, k_IGLd, is_ahead_IL[:, None], None)
        return take(row_I1L[:, 0], self.columns_IN)

    def _attention_next(self, layers: Layers, number: int, x_BLD: mx.array) -> mx.array:
        """What the prompt's last token attends to in a layer with the input x, (I, n)."""
        positions_BL = self.spliced.positions_BL
        q = layers.rotated_queries(number, x_BLD[:, -1:], positions_BL[:, -1:])
        k = layers.rotated_keys(number, x_BLD, positions_BL)
        real_B1S = self.spliced.is_real_BL[:, None]
        rows_BQS = attention(q, k, real_B1S, self.spliced.bias_BL)
        return rows_BQS[self.prompt_I1, 0, self.columns_IN]

    def _attention_before(self, columns_IQ: mx.array) -> mx.array:
        """What rows at some columns of each image's prompt attend to in the layer before,
        (I, Q, n)."""
        positions_IQ = self.spliced.positions_BL[self.prompt_I1, columns_IQ]
        x_IQD = self.before_BLD[self.prompt_I1, columns_IQ]
        q = self.language.rotated_queries(self.layer - 1, x_IQD, positions_IQ)
        prompt_I, bias_BL = self.prompt_I1[:, 0], self.spliced.bias_BL
        is_before_IQS = mx.arange(self.spliced.L) <= columns_IQ[..., None]
        visible_IQS = is_before_IQS & self.spliced.is_real_BL[prompt_I, None]
        k = self.language.held_keys(self.cache_before)
        if self.prompts != list(range(len(k))):
            k = k[prompt_I]
        bias_IL = None if bias_BL is None else bias_BL[prompt_I]
        rows_IQS = attention(q, k, visible_IQS, bias_IL)
        return take(rows_IQS, self.columns_IN, axis=2)
