"""Images on their way from the tower to the language model, reduced by one method after another.

Shapes: I images of a batch, N visual tokens as the tower hands them over, K kept, D features.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from ..checkpoints.errors import UserError
from ..machine.clock import end_part
from ..pruners import Pipeline, Pruner, Reduction, Signals, Stage, StepBudgets
from ..pruners.contract import identity
from ..pruners.trace import ReductionStep
from .splice import ImageSlots, Spliced


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

    @property
    def images(self) -> int:
        return len(self.signals.x_BND)

    @property
    def slots(self) -> int:
        """Visual tokens of each image at present."""
        return self.signals.x_BND.shape[1]

    @property
    def arrays(self) -> list[mx.array]:
        """All arrays, each once."""
        signals = [*self.signals.arrays.values(), *self.encoded.arrays.values()]
        every = [*signals, *self.kept_of_encoded.arrays, *self.kept.arrays]
        return [*{id(array): array for array in every}.values()]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays)

    def reduced(self, kept: Reduction) -> "ImageBatch":
        """The batch after a method that answered with `kept`."""
        (rows, columns), n = self.encoded.grid, self.encoded.x_BND.shape[1]
        kept_of_encoded = kept_of_image = kept.after(self.kept_of_encoded, n)
        if self.kept is not self.kept_of_encoded:
            kept_of_image = kept.after(self.kept, rows * columns)
        return ImageBatch(self.signals.reduced(kept), self.encoded, kept_of_encoded, kept_of_image)

    def split(self) -> "list[ImageBatch]":
        """One image at a time."""
        return [self._image(i) for i in range(self.images)]

    def _image(self, i: int) -> "ImageBatch":
        kept_of_encoded = kept_of_image = self.kept_of_encoded.of_image(i)
        if self.kept is not self.kept_of_encoded:
            kept_of_image = self.kept.of_image(i)
        return ImageBatch(
            self.signals.of_image(i), self.encoded.of_image(i), kept_of_encoded, kept_of_image
        )


def probed(
    pipeline: Pipeline, project: Callable[[mx.array], mx.array], features_BND: mx.array
) -> mx.array | None:
    """How sensitive the projector is to each token, where a method asks; computed when it is read.

    `project` is the projector, of any number of tokens; the features are what it is about to read.
    """
    for step in pipeline.at(Stage.PROJECTED):
        if step.method.probe:
            sensitivity_BN: mx.array = step.call(step.method.probe, project, features_BND)
            return sensitivity_BN
    return None


def prune(
    batches: list[ImageBatch], budgets: StepBudgets, stage: Stage
) -> tuple[list[ImageBatch], list[ReductionStep]]:
    """The batches after the methods of a stage, and what each method left."""
    steps = []
    for pruner, K in budgets.at(stage):
        batches = [part for batch in batches for part in _prune_batch(batch, pruner, K)]
        steps.append(reduction_step(batches, [pruner]))
    return batches, steps


def reduction_step(batches: list[ImageBatch], pruners: list[Pruner]) -> ReductionStep:
    """What is left of every image after some methods."""
    reductions = [batch.kept.of_image(i) for batch in batches for i in range(batch.images)]
    return ReductionStep("+".join(pruner.name for pruner in pruners), 0, reductions)


def image_slots(batches: list[ImageBatch], pipeline: Pipeline) -> list[ImageSlots]:
    """What the language model reads of every image."""
    return [slots for batch in batches for slots in _slots(batch, pipeline)]


def cls_rank(batch: ImageBatch, pipeline: Pipeline) -> mx.array | None:
    """The share of an image's tokens, of a tile's where it has tiles, with more attention from CLS
    than each, (I, K); of equals the first comes first. None where nothing reads it. Raises
    UserError where tokens are mixtures."""
    if not pipeline.ranks_by_cls:
        return None
    attention_IK = batch.signals.get("cls_attention_BN")
    if attention_IK is None:
        raise UserError(
            f"{pipeline.spec}: the last method ranks tokens by CLS's attention, and what stands"
            " ahead of it mixes new ones, which have none"
        )
    rank_IK = mx.argsort(mx.argsort(-attention_IK.astype(mx.float32), axis=-1), axis=-1)
    return rank_IK.astype(mx.float32) / rank_IK.shape[1]


def attention_bias(batch: ImageBatch, enhancer: Pruner | None) -> mx.array | None:
    """What an enhancer adds to the attention that kept tokens get, (I, K); None where none left."""
    rows, columns = batch.encoded.grid
    is_whole = batch.slots == batch.encoded.x_BND.shape[1]
    if batch.encoded.get("represented_BN") is not None:
        is_whole = batch.slots == rows * columns
    if enhancer is None or is_whole:
        return None
    method = enhancer.method
    function = method.prompt_bias if enhancer.calibrates else method.attention_bias
    bias_BK: mx.array = enhancer.call(function, batch.encoded, batch.kept_of_encoded)
    return bias_BK


def calibrated(
    spliced: Spliced, batches: list[ImageBatch], enhancer: Pruner | None, positions: int
) -> Spliced:
    """With what an enhancer adds while prompts are read: in the first layer to the attention that
    an image's rows get, in all layers, of prompts with images, for the distance of two of up to
    `positions` rows."""
    if enhancer is None or not enhancer.calibrates:
        return spliced
    first_BL = np.zeros(spliced.x_BLD.shape[:2], np.float32)
    distances = [mx.zeros(positions) for _ in spliced.runs]
    images = [batch for batch in batches for _ in range(batch.images)]
    places = zip(images, spliced.prompt_of, spliced.image_columns, strict=True)
    for batch, prompt, columns in places:
        N, K = batch.encoded.x_BND.shape[1], batch.slots
        if K < N:
            first_BL[prompt, columns], distances[prompt] = enhancer.call(
                enhancer.method.calibration, N, K, positions
            )
    return replace(spliced, first_bias_BL=mx.array(first_BL), distance_BP=mx.stack(distances))


def _prune_batch(batch: ImageBatch, pruner: Pruner, K: int) -> list[ImageBatch]:
    """One method on one batch; where each image has a budget of its own, one batch an image."""
    keeps_all = batch.encoded.x_BND.shape[1] <= K
    if keeps_all or not pruner.has_dynamic_budget:
        return [_keep(batch, pruner, K)]
    budgets = pruner.budgets(batch.signals, batch.encoded, K)
    return [_keep(part, pruner, each) for part, each in zip(batch.split(), budgets, strict=True)]


def _keep(batch: ImageBatch, pruner: Pruner, K: int) -> ImageBatch:
    n = batch.slots
    kept = pruner(batch.signals, min(K, n))
    return batch.reduced(end_part("pruner", kept)) if n > K else batch  # nothing leaves


def _slots(batch: ImageBatch, pipeline: Pipeline) -> list[ImageSlots]:
    bias_BK, index_BK = attention_bias(batch, pipeline.enhancer), batch.kept.index_BK
    rank_BK = cls_rank(batch, pipeline)
    return [
        ImageSlots(
            batch.signals.x_BND[i],
            None if index_BK is None else index_BK[i],
            None if bias_BK is None else bias_BK[i],
            None if rank_BK is None else rank_BK[i],
        )
        for i in range(batch.images)
    ]
