"""A model of ours, MiniMind-V or LLaVA: encode, prune, project, splice, decode.

It alone calls pruners on our models.

Shapes: B prompts, I images over all prompts, N visual tokens, K kept of each image,
L rows of the spliced sequence, D features, T tokens of text, V words.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import mlx.core as mx
from mlx import nn

from ..checkpoints.config import MlxLmConfig, VLMConfig
from ..inputs.prompt import Prompt
from ..machine.clock import end_part
from ..pruners import Pipeline, Pruner, Stage, StepBudgets
from ..pruners.attention_pool import AttentionPool
from ..pruners.contract import Policy
from ..pruners.trace import ReductionStep, Trace
from .decoder import Cuts, Decoded, Decoder
from .image_encoder import ImageEncoder
from .language.minimind import MiniMind
from .language.mlx_lm import MlxLm
from .layers import TwigReader
from .projector import MLPProjector, merge_patches
from .pruning import ImageBatch, calibrated, image_slots, probed, prune, reduction_step
from .splice import Spliced, outside, pad_right, splice
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
        x_BLD = self.run_layers(range(self.language.depth), x_BLD, self.next_B1)
        self.next_B1 = self.next_B1 + token_BL.shape[1]
        return self.language.logits(x_BLD)

    def run_layers(self, layers: range, x_BLD: mx.array, position_B1: mx.array) -> mx.array:
        """Hidden states of more tokens through some of the layers, whose caches grow.

        The first of them stands at `position_B1`.
        """
        L = x_BLD.shape[1]
        positions_BL = position_B1 + mx.arange(L) if L > 1 else position_B1
        return self.language.run(layers, x_BLD, positions_BL, self.cache, contiguous=True)

    def fork(self) -> "Prefill":
        """The same, whose steps leave this one as it is."""
        fork = copy.copy(self)
        fork.cache = [layer.fork() for layer in self.cache]
        return fork


@dataclass(frozen=True)
class SplicedImages:
    """Prompts with their images in place, ahead of the language model."""

    spliced: Spliced
    batches: list[ImageBatch]
    pipeline: Pipeline
    K: int
    policy: Policy
    trace: Trace


class VLM(ImageEncoder):
    """A vision-language model that reads K of N visual tokens."""

    config: VLMConfig

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
        prompts: Sequence[Prompt],
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
        read = self.splice_images(prompts, pixels_IHW3, pruner, K, positions)
        decoded, cache = self.decode(read, twig)
        return self.finish_prefill(read, decoded, cache, last_only)

    def finish_prefill(
        self, read: "SplicedImages", decoded: Decoded, cache: list[Any], last_only: bool = True
    ) -> Prefill:
        """Logits of the last row, or of every row, and what was left of the images."""
        x_BLD, spliced = decoded.spliced.x_BLD, read.spliced
        logits_BLV = end_part(
            "prefill", self.language.logits(x_BLD[:, -1:] if last_only else x_BLD)
        )
        trace = read.trace.after_cuts(read.pipeline.steps[-1].name, decoded.reductions)
        return Prefill(self.language, logits_BLV, spliced.next_B1, cache, spliced.lengths, trace)

    def splice_images(
        self, prompts: Sequence[Prompt], pixels_IHW3: mx.array | None, pruner: Pruner | Pipeline,
        K: int, positions: Policy | None = None,
    ) -> "SplicedImages":  # fmt: skip
        """Encode, prune, project, splice: the rows that the language model's first layer reads."""
        pipeline = Pipeline.of(pruner)
        self.language.check(pipeline)
        batches, budgets = list[ImageBatch](), pipeline.budgets(self.N, K)
        if pixels_IHW3 is not None:
            batches = [self.encode(pixels_IHW3, pipeline, budgets)]  # encode
        return self.splice_encoded(prompts, batches, pipeline, budgets, positions)

    def splice_encoded(
        self, prompts: Sequence[Prompt], batches: list[ImageBatch], pipeline: Pipeline,
        budgets: StepBudgets, positions: Policy | None = None,
    ) -> "SplicedImages":  # fmt: skip
        """`splice_images` after the tower."""
        steps: list[ReductionStep] = []
        if batches:
            if pipeline.needs_signal("text"):
                batches = self.add_text(batches, prompts)
            if pipeline.needs_signal("rotation"):
                batches = self.add_rotation(batches, prompts)
            steps.append(reduction_step(batches, pipeline.at(Stage.IMAGE, Stage.ENCODER)))
            batches, features = prune(batches, budgets, Stage.FEATURES)  # prune
            batches = [self.project(batch, pipeline) for batch in batches]  # project
            batches, projected = prune(batches, budgets, Stage.PROJECTED)
            steps += [*features, *projected]
        slots = image_slots(batches, pipeline)
        trace = Trace.of_images(steps, [self.N] * len(slots))
        policy = trace.policy(positions or pipeline.positions)
        spliced = splice(self.language.embed_tokens, prompts, slots, policy)  # splice
        longest = max(len(prompt.ids) for prompt in prompts)
        spliced = calibrated(spliced, batches, pipeline.enhancer, longest)
        return SplicedImages(spliced, batches, pipeline, budgets.K, policy, trace)

    def decode(
        self, read: "SplicedImages", twig: TwigReader | None = None,
        prefill_step_size: int | None = None,
    ) -> tuple[Decoded, list[Any]]:  # fmt: skip
        """Through the language model's layers, inside which rows may leave; with their caches."""
        cuts = self.cuts(read.batches, read.pipeline, read.K, read.policy, twig)
        cache = self.language.make_cache()
        observers = twig.observers if twig else {}
        decode = Decoder(self.language, cache, cuts, observers, prefill_step_size)
        return decode(read.spliced), cache

    def encode(self, pixels_IHW3: mx.array, pipeline: Pipeline, budgets: StepBudgets) -> ImageBatch:
        """The tower, ahead of which pictures may shrink and inside which tokens may leave.

        It does not depend on the words of a prompt.
        """
        encoded = self.run_tower(pixels_IHW3, pipeline, budgets)
        return ImageBatch.of(merge_patches(encoded.signals, self.merge), encoded.kept)

    def add_text(
        self, batches: Sequence[ImageBatch], prompts: Sequence[Prompt]
    ) -> list[ImageBatch]:
        """Encoded images with the embeddings of the words around each."""
        words = []
        for prompt in prompts:
            ids = [prompt.ids[i] for i in outside(prompt.runs, len(prompt.ids))]
            words += [ids] * len(prompt.runs)
        ids_BT, is_real_BT = pad_right(words)
        text_BTD = self.language.embed_tokens(ids_BT)
        with_text, first = [], 0
        for batch in batches:
            rows = slice(first, first := first + batch.images)
            signals = batch.signals.replace(text_BTD=text_BTD[rows], text_real_BT=is_real_BT[rows])
            with_text.append(replace(batch, signals=signals, encoded=signals))
        return with_text

    def add_rotation(
        self, batches: Sequence[ImageBatch], prompts: Sequence[Prompt]
    ) -> list[ImageBatch]:
        """Encoded images with what the language model's first layer makes of their positions."""
        starts, rotated = [start for prompt in prompts for start, _ in prompt.runs], []
        for batch in batches:
            start_I1 = mx.array(starts[: batch.images])[:, None]
            starts = starts[batch.images :]
            index_IN = batch.kept.index_BK
            if index_IN is None:
                index_IN = mx.arange(batch.slots)[None]
            cosine_IN, sine_IN = self.language.mean_rotation(0, start_I1 + index_IN)
            signals = batch.signals.replace(rotary_cosine_BN=cosine_IN, rotary_sine_BN=sine_IN)
            rotated.append(replace(batch, signals=signals))
        return rotated

    def project(self, batch: ImageBatch, pipeline: Pipeline) -> ImageBatch:
        features_BND = batch.signals.x_BND
        x_BND = self.projector(features_BND).astype(self.dtype)  # one that learns is float32
        x_BND = end_part("projector", x_BND)
        held_BND = features_BND if pipeline.needs_signal("features") else None
        sensitivity_BN = probed(pipeline, self.projector, features_BND)
        signals = batch.signals.replace(
            x_BND=x_BND, features_BND=held_BND, sensitivity_BN=sensitivity_BN
        )
        return replace(batch, signals=signals)

    def cuts(
        self, batches: list[ImageBatch], pipeline: Pipeline, K: int, policy: Policy,
        reader: TwigReader | None,
    ) -> Cuts:  # fmt: skip
        """Where the decoder lets go of visual rows, so that an average of K stays of an image."""
        step = pipeline.decoder
        counts = [batch.slots for batch in batches for _ in range(batch.images)]
        if step is None or not counts or max(counts) <= K:
            return Cuts()
        layers, twig = self.config.text.num_hidden_layers, step.weights
        if "twig_attention" in step.method.needs and not (reader and reader.twig is twig):
            reader = TwigReader(twig)
        schedules = [step.call(step.method.schedule, layers, n, K) if n > K else {} for n in counts]
        grids = [self.grid] * len(counts)
        return Cuts(step, schedules, grids, policy, pipeline.enhancer, reader)

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
