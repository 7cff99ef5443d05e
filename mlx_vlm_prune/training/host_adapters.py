"""Stages `lora` and `dora` in a model of mlx-vlm's: its layers and files, our pruners and steps.

The tower, the projector and the pruner stay; the language model reads the tokens that are left.

Shapes: L rows, A tokens of answers, D features, V words.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

from ..checkpoints.adapters import write_adapters
from ..checkpoints.errors import UserError
from ..hosts.adapters import adapter_config, add_adapters
from ..hosts.compatibility import check_pipeline
from ..hosts.families import host_of
from ..hosts.families.pruner_defaults import with_family_defaults
from ..hosts.prepared_inputs import PreparedInputs
from ..hosts.prompt import (
    PrunedPrompt,
    budgets_by_view,
    encode_images_and_text,
    prune_prompt,
)
from ..models.arrays import to_raw
from ..pruners import plan
from .config import TrainConfig
from .host_batches import HostBatch
from .loss import cross_entropy_sum


class HostAdapters(nn.Module):
    """Adapters by mlx-vlm's layers, behind any pruner that works ahead of the language model."""

    starts: Mapping[str, bool] = MappingProxyType({})  # no learned method learns
    counts_answers = False  # only models of ours answer within a run

    def __init__(self, model: Any, processor: Any, config: TrainConfig):
        super().__init__()
        self.settings, self.model = config, model
        self.host = host_of(model, processor)
        self.pipeline = with_family_defaults(plan(config.pruner, {}), self.host.kind)
        self.policy = check_pipeline(self.host, self.pipeline, None)
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
        mx.random.seed(config.seed)
        add_adapters(model, config.adapters)

    def begin_step(self, iteration: int, iters: int) -> None:
        """Nothing changes from step to step."""

    def saved_parameters(self) -> dict[str, mx.array]:
        """What a checkpoint holds."""
        trainable: Any = tree_flatten(self.trainable_parameters())
        return dict(trainable)

    def save_adapters(self, folder: Path, iteration: int) -> None:
        """The files that mlx-vlm writes and reads."""
        settings = asdict(self.settings) | adapter_config(self.model)
        learned: Any = tree_flatten(self.model.trainable_parameters())
        tensors = {name: to_raw(array) for name, array in learned}
        write_adapters(folder, iteration, settings, tensors)

    def save_model(self, folder: Path) -> None:
        """The adapters lie there already."""

    def moved_by_loss(self) -> dict[str, mx.array]:
        """Nothing."""
        return {}

    def loss(self, batch: HostBatch) -> mx.array:
        """Summed over the answers' tokens."""
        pairs = zip(batch.inputs, batch.is_answer, strict=True)
        losses = [self._loss(inputs, int(is_answer.sum())) for inputs, is_answer in pairs]
        return mx.stack(losses).sum()

    def losses(self, batch: HostBatch) -> tuple[mx.array, mx.array]:
        """The same, which is the answers' alone."""
        loss = self.loss(batch)
        return loss, loss

    def _loss(self, inputs: PreparedInputs, count: int) -> mx.array:
        """Of the last `count` ids, which are the answer's."""
        c, host = self.settings, self.host
        with host.preserve_state():
            views = encode_images_and_text(host, inputs, self.pipeline)
            budgets = budgets_by_view(views, c.keep_ratio, c.keep_tokens, self.pipeline)
            prompt = prune_prompt(host, inputs, views, self.pipeline, budgets, self.policy)
            logits_1LV = self._logits(prompt)
        return cross_entropy_sum(logits_1LV[0, -count - 1 : -1], mx.array(inputs.ids[-count:]))

    def _logits(self, prompt: PrunedPrompt) -> mx.array:
        """As mlx-vlm's `generate_step` calls the model, without a cache, (1, L, V)."""
        arguments = dict(prompt.arguments)
        ids, pixels, mask = (arguments.pop(n, None) for n in ("input_ids", "pixel_values", "mask"))
        placed = {n: arguments[n] for n in ("position_ids", "rope_deltas") if n in arguments}
        embedded = self.model.get_input_embeddings(ids, pixels, mask=mask, **arguments)
        more = {n: x for n, x in embedded.to_dict().items() if x is not None}
        embeddings = more.pop("inputs_embeds")
        arguments |= more | placed
        logits: mx.array = self.model.language_model(
            ids, inputs_embeds=embeddings, **arguments
        ).logits
        return logits
