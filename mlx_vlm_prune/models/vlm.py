"""MiniMind-V: encode, prune, project, splice, decode. The only caller of pruners.

Shapes: B prompts, I images over all prompts, N visual tokens, K kept of each image,
L rows of the spliced sequence, D features, T tokens of text, V words.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn

from ..checkpoints.config import MlxLmConfig, VLMConfig
from ..checkpoints.errors import UserError
from ..inputs.resample import shrunk
from ..machine.clock import lap
from ..pruners import Pipeline, Pruner, Reduction, Signals, Stage, StepBudgets, downsample
from ..pruners.attention_pool import AttentionPool
from ..pruners.contract import Policy, identity
from ..pruners.trace import ReductionStep, Trace
from .decoder import Cuts, Decoder, TwigReader
from .language.minimind import MiniMind
from .language.mlx_lm import MlxLm
from .projector import MLPProjector, merged
from .splice import Row, Visual, splice
from .towers.between import Cut
from .towers.vit import VisionTower


class Prefill:
    """Prompts that a model of ours has read: see `generation.prefill`.

    `logits_BLV` are of the last row, or of every row where that was asked for; `next_B1` is the
    position of the next token, `cache` has the rows of every layer.
    """

    def __init__(
        self, language: MiniMind | MlxLm, logits_BLV: mx.array, next_B1: mx.array,
        cache: list[Any], rows: list[int], trace: Trace,
    ):  # fmt: skip
        self.language, self.logits_BLV, self.next_B1 = language, logits_BLV, next_B1
        self.cache, self.rows, self.trace = cache, rows, trace

    @property
    def logits_BV(self) -> mx.array:
        return self.logits_BLV[:, -1]

    @property
    def cache_bytes(self) -> int:
        return sum(layer.nbytes for layer in self.cache)

    def step(self, token_BL: mx.array) -> mx.array:
        """Read more tokens; logits (B, L, V) after each of them."""
        x_BLD = self.language.embed_tokens(token_BL)
        x_BLD = self.onward(range(self.language.depth), x_BLD, self.next_B1)
        self.next_B1 = self.next_B1 + token_BL.shape[1]
        return self.language.logits(x_BLD)

    def onward(self, layers: range, x_BLD: mx.array, position_B1: mx.array) -> mx.array:
        """Hidden states of more tokens through some of the layers, whose caches grow.

        The first of them stands at `position_B1`.
        """
        positions_BL = position_B1 + mx.arange(x_BLD.shape[1])
        return self.language.run(layers, x_BLD, positions_BL, self.cache)

    def fork(self) -> "Prefill":
        """The same, whose steps leave this one as it is."""
        fork = copy.copy(self)
        fork.cache = [layer.fork() for layer in self.cache]
        return fork


@dataclass(frozen=True)
class ImageBatch:
    """Images that are reduced together."""

    signals: Signals  # of the tokens at present
    encoded: Signals  # as the tower handed them over
    kept_of_encoded: Reduction
    kept: Reduction  # of the whole images; the same object where none left inside the tower

    @classmethod
    def of(cls, encoded: Signals, kept_in_tower: Reduction | None = None) -> "ImageBatch":
        """As the tower hands them over; `kept_in_tower` is what stayed of the patches inside."""
        every = identity(encoded.x_BND)
        return cls(encoded, encoded, every, kept_in_tower or every)

    def reduced(self, kept: Reduction) -> "ImageBatch":
        (rows, columns), n = self.encoded.grid, self.encoded.x_BND.shape[1]
        kept_of_encoded = whole = kept.after(self.kept_of_encoded, n)
        if self.kept is not self.kept_of_encoded:
            whole = kept.after(self.kept, rows * columns)
        return ImageBatch(self.signals.reduced(kept), self.encoded, kept_of_encoded, whole)

    def split(self) -> "list[ImageBatch]":
        """One image at a time."""
        batches = []
        for i in range(self.images):
            kept_of_encoded = whole = self.kept_of_encoded.of_image(i)
            if self.kept is not self.kept_of_encoded:
                whole = self.kept.of_image(i)
            batches.append(
                ImageBatch(
                    self.signals.of_image(i), self.encoded.of_image(i), kept_of_encoded, whole
                )
            )
        return batches

    @property
    def images(self) -> int:
        return len(self.signals.x_BND)


class VLM(nn.Module):
    """A vision-language model that reads K of N visual tokens."""

    def __init__(self, config: VLMConfig):
        super().__init__()
        self.config = config
        vision, dims = config.vision, (config.vision.hidden_size, config.text.hidden_size)
        self.tower = VisionTower(vision)
        projector = config.projector
        self.projector = MLPProjector(*dims, projector) if projector else nn.Linear(*dims)
        text = config.text
        self.language: MiniMind | MlxLm = (
            MlxLm(text) if isinstance(text, MlxLmConfig) else MiniMind(text)
        )
        learned = {}
        if config.pruner:
            self.pruner = learned[config.pruner[0]] = AttentionPool(
                config.pruner[1], config.vision.hidden_size
            )
        # Weights of learned methods, by name; a proxy, so that they are no parameters of ours.
        self.learned: Mapping[str, Any] = MappingProxyType(learned)

    def __call__(
        self,
        prompts: Sequence[Row],
        pixels_IHW3: mx.array | None,
        pruner: Pruner | Pipeline,
        K: int,
        positions: Policy | None = None,
        *,
        last_only: bool = True,
        twig: TwigReader | None = None,
    ) -> Prefill:
        """Read B prompts with I images, K tokens of each; of a decoder method, K is the
        average over layers. Without `positions`, those of the method's paper. A `twig` reads
        along; without `last_only` there are logits of every row."""
        pipeline = Pipeline.of(pruner)
        self.language.check(pipeline)
        batches: list[ImageBatch] = []
        steps: list[ReductionStep] = []
        if pixels_IHW3 is not None:
            budgets = pipeline.budgets(self.N, K)
            batches = [self.encode(pixels_IHW3, pipeline, budgets, prompts)]  # encode
            steps.append(_step(batches, pipeline.at(Stage.IMAGE, Stage.ENCODER)))
            batches, more = prune(batches, budgets, Stage.FEATURES)  # prune
            steps += more
            batches = [self.project(batch) for batch in batches]  # project
            batches, more = prune(batches, budgets, Stage.PROJECTED)
            steps += more
        visual = [slot for batch in batches for slot in _slots(batch, pipeline.enhancer)]
        pooled = any(slots.index_K is None for slots in visual)  # slots without an own place
        policy: Policy = "renumber" if pooled else positions or pipeline.positions
        spliced = splice(self.language.embed_tokens, prompts, visual, policy)  # splice
        cuts = self.cuts(batches, pipeline, K, policy, twig)
        cache = self.language.make_cache()
        read = Decoder(self.language, cache, cuts, twig.watch if twig else {})  # decode
        decoded = read(spliced)
        x_BLD = decoded.spliced.x_BLD
        logits_BLV = lap("prefill", self.language.logits(x_BLD[:, -1:] if last_only else x_BLD))
        trace = Trace.of_images(steps, [self.N] * len(visual))
        trace = trace.after_cuts(pipeline.steps[-1].name, decoded.reductions)
        return Prefill(self.language, logits_BLV, spliced.next_B1, cache, spliced.lengths, trace)

    def encode(
        self, pixels_IHW3: mx.array, pipeline: Pipeline, budgets: StepBudgets,
        prompts: Sequence[Row],
    ) -> ImageBatch:  # fmt: skip
        """The tower, inside which tokens may leave already; the prompt's words beside."""
        layers, cuts, N, within = self.config.vision.depth, [], self.N, None
        for step, own in budgets.per_step:
            if step.stage is Stage.IMAGE and own < N:
                small = downsample.smaller_grid(self.grid, own)
                patch = self.config.vision.patch_size
                height, width = (n * m * patch for n, m in zip(small, self.merge, strict=True))
                pixels_IHW3 = shrunk(pixels_IHW3, (height, width))
                within = downsample.block_means(self.grid, small, len(pixels_IHW3))
                N = small[0] * small[1]
            elif step.stage is Stage.ENCODER and own < N:
                if self.merge != (1, 1):
                    raise UserError(
                        f"{step.name} works inside the tower; behind this one neighbouring patches"
                        " become one visual token, so all must be there: choose another method"
                    )
                at = step.call(step.method.cuts, layers, N, own)
                cuts += [Cut(layer, place, left, step) for layer, place, left in at]
                N = own
        done = lap("vision", self.tower(pixels_IHW3, pipeline.signal_layers(layers), cuts))
        if done.kept:
            within = done.kept.after(within, self.N) if within else done.kept
        seen = merged(done.signals, self.merge)
        seen = self.add_text(seen, prompts) if pipeline.needs_signal("text") else seen
        return ImageBatch.of(seen, within)

    def add_text(self, signals: Signals, prompts: Sequence[Row]) -> Signals:
        """With the embeddings of the words around each image."""
        words = []
        for row in prompts:
            inside = {p for start, length in row.runs for p in range(start, start + length)}
            ids = [token for p, token in enumerate(row.ids) if p not in inside]
            words += [ids] * len(row.runs)
        T = max(1, *map(len, words))
        real = np.array([[i < len(ids) for i in range(T)] for ids in words])
        padded = np.array([ids + [0] * (T - len(ids)) for ids in words], dtype=np.int32)
        text_BTD = self.language.embed_tokens(mx.array(padded))
        return signals.replace(text_BTD=text_BTD, text_real_BT=mx.array(real))

    def project(self, batch: ImageBatch) -> ImageBatch:
        x_BND = lap("projector", self.projector(batch.signals.x_BND))
        return replace(batch, signals=batch.signals.replace(x_BND=x_BND))

    def cuts(
        self, batches: list[ImageBatch], pipeline: Pipeline, K: int, policy: Policy,
        reader: TwigReader | None,
    ) -> Cuts:  # fmt: skip
        """Where the decoder lets go of visual rows, so that an average of K stays of an image."""
        step = pipeline.decoder
        counts = [batch.signals.x_BND.shape[1] for batch in batches for _ in range(batch.images)]
        if step is None or not counts or max(counts) <= K:
            return Cuts()
        layers, twig = self.config.text.num_hidden_layers, step.learned
        if "twig_attention" in step.method.needs and not (reader and reader.twig is twig):
            reader = TwigReader(twig)
        schedules = [step.call(step.method.schedule, layers, n, K) if n > K else {} for n in counts]
        grids = [self.grid] * len(counts)
        return Cuts(step, schedules, grids, policy, pipeline.enhancer, reader)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of visual tokens."""
        return self.config.grid

    @property
    def merge(self) -> tuple[int, int]:
        """How many patches, down and across, one visual token is made of."""
        return self.config.merge

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
        return self.config.N


def prune(
    batches: list[ImageBatch], budgets: StepBudgets, stage: Stage
) -> tuple[list[ImageBatch], list[ReductionStep]]:
    """What the methods of a stage leave, and the steps on the way."""
    steps = []
    for pruner, tokens in budgets.at(stage):
        batches = [less for batch in batches for less in _reduce(batch, pruner, tokens)]
        steps.append(_step(batches, [pruner]))
    return batches, steps


def _step(batches: list[ImageBatch], pruners: list[Pruner]) -> ReductionStep:
    reductions = [batch.kept.of_image(i) for batch in batches for i in range(batch.images)]
    return ReductionStep("+".join(pruner.name for pruner in pruners), 0, reductions)


def _reduce(batch: ImageBatch, pruner: Pruner, K: int) -> list[ImageBatch]:
    """One step of one batch; where each image has a budget of its own, one batch an image."""
    batches, budgets = [batch], [K]
    if pruner.has_dynamic_budget:
        batches, budgets = batch.split(), pruner.budgets(batch.signals, K)
    return [_keep(*pair, pruner) for pair in zip(batches, budgets, strict=True)]


def _keep(batch: ImageBatch, K: int, pruner: Pruner) -> ImageBatch:
    N = batch.signals.x_BND.shape[1]
    kept = pruner(batch.signals, min(K, N))
    # where all stay nothing is computed
    return batch.reduced(lap("pruner", kept)) if K < N else batch


def _slots(batch: ImageBatch, enhancer: Pruner | None) -> list[Visual]:
    """Each image's slots, ready to be spliced."""
    bias_BK, index_BK = None, batch.kept.index_BK
    if enhancer and batch.signals.x_BND.shape[1] < batch.encoded.x_BND.shape[1]:
        bias_BK = enhancer.call(
            enhancer.method.attention_bias, batch.encoded, batch.kept_of_encoded
        )
    return [
        Visual(
            batch.signals.x_BND[i],
            None if index_BK is None else index_BK[i],
            None if bias_BK is None else bias_BK[i],
        )
        for i in range(batch.images)
    ]
