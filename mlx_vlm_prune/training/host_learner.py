"""What learns in a model of mlx-vlm's: its layers and files, our pruners and steps.

The tower and the projector stay; the language model reads the tokens that are left.

Shapes: L rows, A tokens of answers, V words.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

from ..checkpoints.errors import UserError
from ..hosts.compatibility import check_pipeline
from ..hosts.families.pruner_defaults import plan_for_host
from ..hosts.host import Host
from ..hosts.prepared_inputs import PreparedInputs
from ..hosts.prompt import (
    ImageBudget,
    PrunedPrompt,
    encode_images_and_text,
    prune_prompt,
)
from .config import TrainConfig
from .host_batches import HostBatch
from .loss import cross_entropy_sum


class HostLearner(nn.Module):
    """A model of mlx-vlm's behind any pruner that works ahead of its language model."""

    # Of each learned method that learns: does it begin with untrained weights?
    starts: Mapping[str, bool] = MappingProxyType({})
    counts_answers = False  # only models of ours answer within a run

    def __init__(self, host: Host, config: TrainConfig, learned: Mapping[str, nn.Module]):
        super().__init__()
        self.settings, self.model = config, host.model
        self.host, self.pipeline = host, plan_for_host(host, config.pruner, learned)
        self.policy = check_pipeline(host, self.pipeline, None)
        self.iteration, self.iters = 0, 1
        if self.pipeline.decoder:
            raise UserError(
                f"{self.pipeline.decoder.name} drops tokens inside the language model, where a"
                " model of mlx-vlm's is not trained; take a method ahead of it"
            )
        if self.pipeline.enhancer:
            raise UserError(
                f"{self.pipeline.enhancer.name} adds to attention by a cache, and a model of"
                " mlx-vlm's is trained without one; leave it out"
            )
        if config.freeze or config.unfreeze:
            raise UserError("freeze and unfreeze are for models of ours, not of mlx-vlm's")

    def begin_step(self, iteration: int, iters: int) -> None:
        """Step `iteration` of `iters`, counted from 0, comes next."""
        self.iteration, self.iters = iteration, iters

    def saved_parameters(self) -> dict[str, mx.array]:
        """What a checkpoint holds."""
        trainable: Any = tree_flatten(self.trainable_parameters())
        return dict(trainable)

    def save_adapters(self, folder: Path, iteration: int) -> None:
        """What a user loads afterwards, ahead of the checkpoint of this step."""

    def save_model(self, folder: Path) -> None:
        """Write the model that the last step leaves, for a user to load."""

    def moved_by_loss(self) -> dict[str, mx.array]:
        """Nothing."""
        return {}

    def loss(self, batch: HostBatch) -> mx.array:
        """What learning lowers, summed over the answers' tokens; in evaluation, behind the pruner
        as it is used."""
        return self.losses(batch)[0]

    def losses(self, batch: HostBatch) -> tuple[mx.array, mx.array]:
        """The same, and the part of it that is the answers' cross-entropy."""
        losses = []
        for inputs, is_answer in zip(batch.inputs, batch.is_answer, strict=True):
            with self.host.preserve_state():
                losses.append(self.losses_of(inputs, int(is_answer.sum())))
        loss, answers = (mx.stack([*each]).sum() for each in zip(*losses, strict=True))
        return loss, answers

    def losses_of(self, inputs: PreparedInputs, count: int) -> tuple[mx.array, mx.array]:
        """Of one example, whose last `count` ids are the answer's."""
        loss = answer_loss(self.logits(inputs), inputs, count)
        return loss, loss

    def logits(self, inputs: PreparedInputs) -> mx.array:
        """Behind the pruner, (1, L, V)."""
        c, host = self.settings, self.host
        by_view = ImageBudget(c.keep_ratio, c.keep_tokens).by_view(self.pipeline)
        views = encode_images_and_text(host, inputs, self.pipeline, by_view)
        budgets = by_view(views)
        prompt = prune_prompt(host, inputs, views, self.pipeline, budgets, self.policy)
        ids, arguments = self.embed(prompt)
        logits: mx.array = self.model.language_model(ids, **arguments).logits
        return logits

    def embed(self, prompt: PrunedPrompt) -> tuple[mx.array, dict[str, Any]]:
        """The ids, and with what mlx-vlm's `generate_step` calls the language model."""
        arguments = dict(prompt.arguments)
        ids, pixels, mask = (arguments.pop(n, None) for n in ("input_ids", "pixel_values", "mask"))
        placed = {n: arguments[n] for n in ("position_ids", "rope_deltas") if n in arguments}
        embedded = self.model.get_input_embeddings(ids, pixels, mask=mask, **arguments)
        more = {n: x for n, x in embedded.to_dict().items() if x is not None}
        return ids, arguments | more | placed


def answer_loss(logits_1LV: mx.array, inputs: PreparedInputs, count: int) -> mx.array:
    """The cross-entropy of the last `count` ids, summed."""
    return cross_entropy_sum(logits_1LV[0, -count - 1 : -1], mx.array(inputs.ids[-count:]))
