"""Stages `lora` and `dora` in a model of mlx-vlm's: its layers and files, our pruners and steps.

The tower, the projector and the pruner stay; the language model reads the tokens that are left.

Shapes: L rows, A tokens of answers, D features, V words.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten

from ..checkpoints.errors import UserError
from ..hosts.adapters import adapter_config, add_adapters
from ..hosts.compatibility import check_pipeline
from ..hosts.families import host_of
from ..hosts.families.pruner_defaults import with_family_defaults
from ..hosts.host import Host
from ..hosts.prepared_inputs import PreparedInputs
from ..hosts.prompt import (
    PrunedPrompt,
    budgets_by_view,
    encode_images_and_text,
    prepare_prompt,
    prune_prompt,
)
from ..inputs.image import open_image
from ..models.adapters import AdapterConfig
from ..pruners import plan
from .adapters import write_adapters
from .config import TrainConfig
from .examples import Example
from .formats import Dataset
from .loss import cross_entropy_sum


@dataclass(frozen=True)
class HostExample:
    """A question with its images, and the ids of the answer with its end."""

    inputs: PreparedInputs  # with the answer
    answer: list[int]


@dataclass(frozen=True)
class HostBatch:
    """Examples that are read one after another."""

    examples: Sequence[HostExample]
    prompts: Sequence[Any] = ()  # as of a `Batch`: none that validation could ask
    is_answer: Sequence[Any] = ()
    pixels_IHW3: None = None

    @property
    def answer_tokens(self) -> int:
        """A."""
        return sum(len(example.answer) for example in self.examples)

    @property
    def tokens(self) -> int:
        return sum(len(example.inputs.ids) for example in self.examples)


@dataclass
class HostReader:
    """Turns examples of a data set into batches, by mlx-vlm's chat template and processor."""

    dataset: Dataset
    host: Host
    max_seq_length: int
    skip_bad: bool = False
    bad: dict[int, str] = field(default_factory=dict)
    cut: set[int] = field(default_factory=set)  # none: a longer example is refused

    def batch(self, indices: np.ndarray, ahead: Iterable[np.ndarray] = ()) -> HostBatch | None:
        """The examples of these numbers; None where none of them can be used. Raises UserError."""
        examples = []
        for index in indices.tolist():
            example = self.dataset[index]
            try:
                examples.append(self._read(example))
            except UserError as e:
                self.bad[index] = f"{example.where}: {e}"
                if not self.skip_bad:
                    raise UserError(
                        f"{example.where}: {e} (skip_bad leaves such examples out)"
                    ) from None
        return HostBatch(examples) if examples else None

    def _read(self, example: Example) -> HostExample:
        if len(example.turns) != 1 or example.system:
            raise UserError("a model of mlx-vlm's learns from one question and one answer here")
        question, answer = example.turns[0]
        images = [open_image(image() if callable(image) else image) for image in example.images]
        inputs = prepare_prompt(self.host, question.replace("<image>", "").strip(), images)
        tokenizer = getattr(self.host.processor, "tokenizer", self.host.processor)
        ids = list(tokenizer.encode(answer, add_special_tokens=False))
        ids += [end] if (end := getattr(tokenizer, "eos_token_id", None)) is not None else []
        whole = [*inputs.ids, *ids]
        if not ids or len(whole) > self.max_seq_length:
            raise UserError(f"it has {len(whole)} tokens, {len(ids)} of them of the answer")
        mask_1L = mx.concatenate([inputs.mask_1L, mx.ones((1, len(ids)), mx.int32)], axis=1)
        return HostExample(replace(inputs, ids=whole, mask_1L=mask_1L), ids)


class HostAdapters(nn.Module):
    """Adapters by mlx-vlm's layers, behind any pruner that works ahead of the language model."""

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
        self.adapter_config = AdapterConfig.of(
            config.stage, config.num_layers, config.lora_parameters
        )
        mx.random.seed(config.seed)
        add_adapters(model, self.adapter_config)

    def begin_step(self, iteration: int, iters: int) -> None:
        """Nothing changes from step to step."""

    def saved_parameters(self) -> dict[str, mx.array]:
        """What a checkpoint holds."""
        trainable: Any = tree_flatten(self.trainable_parameters())
        return dict(trainable)

    def write(self, folder: Path, iteration: int) -> None:
        """The files that mlx-vlm writes and reads."""
        settings = asdict(self.settings) | adapter_config(self.model)
        write_adapters(self.model, settings, folder, iteration)

    def finish(self, folder: Path) -> None:
        """The adapters lie there already."""

    def loss(self, batch: HostBatch) -> mx.array:
        """Summed over the answers' tokens."""
        losses = [self._loss(example) for example in batch.examples]
        return mx.stack(losses).sum()

    def _loss(self, example: HostExample) -> mx.array:
        c, host = self.settings, self.host
        with host.preserve_state():
            views = encode_images_and_text(host, example.inputs, self.pipeline)
            budgets = budgets_by_view(views, c.keep_ratio, c.keep_tokens, self.pipeline)
            prompt = prune_prompt(host, example.inputs, views, self.pipeline, budgets, self.policy)
            logits_1LV = self._logits(prompt)
        count = len(example.answer)
        return cross_entropy_sum(logits_1LV[0, -count - 1 : -1], mx.array(example.answer))

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
