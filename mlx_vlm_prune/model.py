"""MiniMind-V: encode, prune, project, splice, decode. The only caller of pruners.

Shapes: B prompts, I images over all prompts, N visual tokens, K kept of each image,
L rows of the spliced sequence, D features, T tokens of text, V words.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn

from .cache import LayerCache
from .checkpoints.errors import UserError
from .decoder import Cuts, Growth, Segment, read
from .language.minimind import MiniMind, MiniMindConfig
from .language.mlx_lm import MlxLm, MlxLmConfig
from .projector import MLPProjector, ProjectorConfig, merged
from .pruners import Pipeline, Pruner, Reduction, Signals, Stage, StepBudgets, downsample
from .pruners.attention_pool import AttentionPool
from .pruners.contract import Policy, identity
from .resample import shrunk
from .splice import Row, Visual, splice
from .towers.between import Cut
from .towers.clip import CLIPConfig, CLIPTower
from .towers.siglip import SiglipConfig, SiglipTower

Lap = Callable[[str, Any], Any]


@dataclass(frozen=True)
class VLMConfig:
    """What config.json says; `pruner` is the name and size of learned weights, if any.

    Without `projector` it is one matrix.
    """

    vision: CLIPConfig | SiglipConfig = field(default_factory=CLIPConfig)
    text: MiniMindConfig | MlxLmConfig = field(default_factory=MiniMindConfig)
    projector: ProjectorConfig | None = None
    image_token: str = "@"
    image_token_id: int = 34
    pruner: tuple[str, int] | None = None


@dataclass(frozen=True)
class Prefill:
    """What the first forward pass hands to decoding, and what became of the visual tokens.

    `trace` says what was left of the whole images after every step (empty without images).
    """

    logits_BLV: mx.array
    trace: list["Stop"]
    next_B1: mx.array  # the position of the first new token
    lengths: list[int]  # rows of each prompt in the first layer
    segments: list[Segment]
    cache: list[LayerCache]


@dataclass(frozen=True)
class Stop:
    """What was left of every image after a step, from `layer` of the language model on."""

    step: str
    layer: int
    kept: list[Reduction]


@dataclass(frozen=True)
class Lot:
    """Images that are reduced together."""

    signals: Signals  # of the tokens at present
    seen: Signals  # as the tower handed them over
    since: Reduction  # what became of those
    kept: Reduction  # what became of the whole image; the same object where none left inside

    @classmethod
    def of(cls, seen: Signals, within: Reduction | None = None) -> "Lot":
        """As the tower hands them over; `within`: what became of the patches inside it."""
        since = identity(seen.x_BND)
        return cls(seen, seen, since, within or since)

    def reduced(self, kept: Reduction) -> "Lot":
        (rows, columns), n = self.seen.grid, self.seen.x_BND.shape[1]
        since = kept.after(self.since, n)
        whole = since if self.kept is self.since else kept.after(self.kept, rows * columns)
        return Lot(self.signals.reduced(kept), self.seen, since, whole)

    def split(self) -> "list[Lot]":
        """One image at a time."""
        lots = []
        for i in range(self.images):
            since = self.since.of(i)
            whole = since if self.kept is self.since else self.kept.of(i)
            lots.append(Lot(self.signals.of(i), self.seen.of(i), since, whole))
        return lots

    @property
    def images(self) -> int:
        return len(self.signals.x_BND)


def no_lap(name: str, value: Any = None) -> Any:
    """Of a request that nobody times: nothing is waited for."""
    return value


class VLM(nn.Module):
    """A vision-language model that reads K of N visual tokens."""

    def __init__(self, config: VLMConfig):
        super().__init__()
        self.config = config
        vision, dims = config.vision, (config.vision.hidden_size, config.text.hidden_size)
        self.tower: CLIPTower | SiglipTower = (
            SiglipTower(vision) if isinstance(vision, SiglipConfig) else CLIPTower(vision)
        )
        told = config.projector
        self.projector = MLPProjector(*dims, told) if told else nn.Linear(*dims)
        text = config.text
        self.language: MiniMind | MlxLm = (
            MlxLm(text) if isinstance(text, MlxLmConfig) else MiniMind(text)
        )
        held = {}
        if config.pruner:
            self.pruner = held[config.pruner[0]] = AttentionPool(
                config.pruner[1], config.vision.hidden_size
            )
        # Weights of learned methods, by name; a proxy, so that they are no parameters of ours.
        self.learned: Mapping[str, Any] = MappingProxyType(held)

    def __call__(
        self,
        rows: Sequence[Row],
        pixels_IHW3: mx.array | None,
        pruner: Pruner | Pipeline,
        K: int,
        positions: Policy | None = None,
        *,
        last_only: bool = True,
        lap: Lap = no_lap,
        growth: Growth | None = None,
    ) -> Prefill:
        """Read B prompts with I images, K tokens of each; of a decoder method, K is the
        average over layers. Without `positions`, those of the method's paper.
        `lap(name, value)` may evaluate and time each part; a `growth` reads along."""
        pipeline = Pipeline.of(pruner)
        self.language.check(pipeline)
        policy = positions or pipeline.positions
        lots, cuts, trace = [], Cuts(), []
        if pixels_IHW3 is not None:
            budgets = pipeline.budgets(self.N, K)
            lots = [self.encode(pixels_IHW3, pipeline, budgets, rows, lap)]  # encode
            trace += [_stop(lots, pipeline.at(Stage.IMAGE, Stage.ENCODER))]
            lots, seen = prune(lots, budgets, Stage.FEATURES, lap)  # prune
            lots = [self.project(lot, lap) for lot in lots]  # project
            lots, more = prune(lots, budgets, Stage.PROJECTED, lap)
            trace += seen + more
            cuts = self.cuts(lots, pipeline, K, policy)
        visual = [slot for lot in lots for slot in _slots(lot, pipeline.enhancer)]
        told = splice(self.language.embed_tokens, rows, visual, policy)  # splice
        cache = self.language.make_cache()
        done = read(self.language, told, self.grid, cache, cuts, last_only, lap, growth)  # decode
        lap("prefill", done.logits_BLV)
        for layer, kept in done.reductions:
            before = trace[-1].kept
            after = [kept.of(i).after(one, self.N) for i, one in enumerate(before)]
            trace.append(Stop(f"{pipeline.steps[-1].name}, layer {layer}", layer, after))
        return Prefill(done.logits_BLV, trace, told.next_B1, told.lengths, done.segments, cache)

    def encode(
        self, pixels_IHW3: mx.array, pipeline: Pipeline, budgets: StepBudgets,
        rows: Sequence[Row], lap: Lap,
    ) -> Lot:  # fmt: skip
        """The tower, inside which tokens may leave already; the prompt's words beside."""
        layers, cuts, N, within = self.config.vision.depth, [], self.N, None
        for step, own in budgets.each:
            if step.stage is Stage.IMAGE and own < N:
                small = downsample.smaller(self.grid, own)
                height, width = (n * m * self.patch for n, m in zip(small, self.merge, strict=True))
                pixels_IHW3 = shrunk(pixels_IHW3, (height, width))
                within = downsample.blocks(self.grid, small, len(pixels_IHW3))
                N = small[0] * small[1]
            elif step.stage is Stage.ENCODER and own < N:
                if self.merge != (1, 1):
                    raise UserError(
                        f"{step.name} works inside the tower; behind this one neighbouring patches"
                        " become one visual token, so all must be there: choose another method"
                    )
                at = step.ask(step.method.cuts, layers, N, own)
                cuts += [Cut(layer, place, left, step) for layer, place, left in at]
                N = own
        done = lap("vision", self.tower(pixels_IHW3, pipeline.want(layers), cuts))
        if done.kept:
            within = done.kept.after(within, self.N) if within else done.kept
        seen = merged(done.signals, self.merge)
        seen = self.worded(seen, rows) if pipeline.wants("text") else seen
        return Lot.of(seen, within)

    def worded(self, signals: Signals, rows: Sequence[Row]) -> Signals:
        """With the embeddings of the words around each image."""
        words = []
        for row in rows:
            inside = {p for start, length in row.runs for p in range(start, start + length)}
            ids = [token for p, token in enumerate(row.ids) if p not in inside]
            words += [ids] * len(row.runs)
        T = max(1, *map(len, words))
        real = np.array([[i < len(ids) for i in range(T)] for ids in words])
        padded = np.array([ids + [0] * (T - len(ids)) for ids in words], dtype=np.int32)
        text_BTD = self.language.embed_tokens(mx.array(padded))
        return signals.replace(text_BTD=text_BTD, text_real_BT=mx.array(real))

    def project(self, lot: Lot, lap: Lap = no_lap) -> Lot:
        x_BND = lap("projector", self.projector(lot.signals.x_BND))
        return replace(lot, signals=lot.signals.replace(x_BND=x_BND))

    def cuts(self, lots: list[Lot], pipeline: Pipeline, K: int, policy: Policy) -> Cuts:
        """Where the decoder lets go of visual rows, so that an average of K stays."""
        step, counts = pipeline.decoder, {lot.signals.x_BND.shape[1] for lot in lots}
        if step is None or max(counts) <= K:
            return Cuts()
        if len(counts) > 1:
            raise UserError(f"{pipeline.name}: in the decoder all images need as many tokens")
        layers = self.config.text.num_hidden_layers
        schedule = step.ask(step.method.schedule, layers, counts.pop(), K)
        return Cuts(step, schedule, pipeline.enhancer, policy)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of visual tokens."""
        rows, columns = self.config.vision.grid
        return rows // self.merge[0], columns // self.merge[1]

    @property
    def merge(self) -> tuple[int, int]:
        """How many patches, down and across, one visual token is made of."""
        return self.config.projector.merge if self.config.projector else (1, 1)

    @property
    def patch(self) -> int:
        """Pixels along a patch."""
        return self.config.vision.patch_size

    @property
    def feature_dims(self) -> int:
        """Of a visual token before the projector."""
        return self.config.vision.hidden_size * self.merge[0] * self.merge[1]

    @property
    def dtype(self) -> mx.Dtype:
        return self.language.norm.weight.dtype

    @property
    def N(self) -> int:
        """Visual tokens of one image."""
        return self.grid[0] * self.grid[1]

    def step(self, token_BL: mx.array, position_B1: mx.array, before: Prefill) -> mx.array:
        """Logits (B, L, V) after more tokens, mostly one; the cache in `before` grows by them.
        `position_B1` is where the first stands."""
        every = range(self.config.text.num_hidden_layers)
        x_BLD = self.language.embed_tokens(token_BL)
        return self.language.logits(self.onward(every, x_BLD, position_B1, before))

    def onward(
        self, layers: range, x_BLD: mx.array, position_B1: mx.array, before: Prefill
    ) -> mx.array:
        """Hidden states of more tokens through some of the layers, whose caches grow; rows that
        left between layers left each with its own places."""
        for part in before.segments:
            first, end = max(layers.start, part.layers.start), min(layers.stop, part.layers.stop)
            if first < end:
                place_BL = position_B1 + part.shift_B1 + mx.arange(x_BLD.shape[1])
                x_BLD = self.language.run(
                    range(first, end), x_BLD, place_BL, before.cache, padded=part.padded
                )
        return x_BLD


def prune(
    lots: list[Lot], budgets: StepBudgets, stage: Stage, lap: Lap
) -> tuple[list[Lot], list[Stop]]:
    """What the methods of a stage leave, and the stops on the way."""
    stops = []
    for step, own in budgets.at(stage):
        lots = [smaller for lot in lots for smaller in _reduce(lot, step, own, lap)]
        stops.append(_stop(lots, [step]))
    return lots, stops


def _stop(lots: list[Lot], steps: list[Pruner]) -> Stop:
    kept = [lot.kept.of(i) for lot in lots for i in range(lot.images)]
    return Stop("+".join(step.name for step in steps), 0, kept)


def _reduce(lot: Lot, step: Pruner, K: int, lap: Lap) -> list[Lot]:
    """One step of one lot; where each image has a budget of its own, one lot an image."""
    lots, budgets = [lot], [K]
    if step.has_dynamic_budget:
        lots, budgets = lot.split(), step.budgets(lot.signals, K)
    return [_smaller(*pair, step, lap) for pair in zip(lots, budgets, strict=True)]


def _smaller(lot: Lot, K: int, step: Pruner, lap: Lap) -> Lot:
    N = lot.signals.x_BND.shape[1]
    kept = step(lot.signals, min(K, N))
    return lot.reduced(lap("pruner", kept)) if K < N else lot  # where all stay nothing is computed


def _slots(lot: Lot, enhancer: Pruner | None) -> list[Visual]:
    """Each image's slots, ready to be spliced."""
    bias_BK, index_BK = None, lot.kept.index_BK
    if enhancer and lot.signals.x_BND.shape[1] < lot.seen.x_BND.shape[1]:
        bias_BK = enhancer.ask(enhancer.method.weigh, lot.seen, lot.since)
    return [
        Visual(
            lot.signals.x_BND[i],
            None if index_BK is None else index_BK[i],
            None if bias_BK is None else bias_BK[i],
        )
        for i in range(lot.images)
    ]
