"""What learns in a stage: which parameters move, and the loss that moves them.

A stage is a `Learner`. Its trainable parameters are what the optimizer changes, and what a
checkpoint holds.
"""

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

from ..checkpoints.config import SiglipConfig
from ..checkpoints.errors import UserError
from ..generation.steps import greedy_answers
from ..inputs.budget import budget, check_training_budget
from ..models.language.mlx_lm import MlxLm
from ..models.vlm import VLM
from ..pruners import Pipeline, Stage, plan
from .batches import Batch
from .config import TrainConfig
from .loss import OthersBias, answer_loss, factor_loss, pixels
from .pruner_weights import TRAINABLE, add_untrained, trained_inside
from .save_model import save_model
from .stage_rules import falling, trains
from .validation import ShortQuestions

logger = logging.getLogger("mlx_vlm_prune")


class Learner(nn.Module):
    """A model, of which some parts learn to answer behind a pruner.

    The weights of a learned pruner are in `pruners`, by name, or in the model itself where its
    checkpoint has them inside.
    """

    # Of each learned method that learns: does it begin with untrained weights?
    starts: Mapping[str, bool] = MappingProxyType({})
    counts_answers = True  # evaluations count which answers are right

    def __init__(self, model: VLM, config: TrainConfig):
        super().__init__()
        TRAINABLE.check(config)
        self.settings = config
        self.model = model
        self.iteration, self.iters = 0, 1
        check_training_budget(model.N, config.keep_tokens)
        if self.trains("pruner"):
            untrained = add_untrained(model, config)
            names = TRAINABLE.of_chain(config.pruner)
            self.starts = MappingProxyType({name: name in untrained for name in names})
        self.pipeline: Pipeline = plan(config.pruner, model.learned)
        self.K = budget(model.N, config.keep_ratio, config.keep_tokens, self.pipeline)
        self.pruners: dict[str, nn.Module] = {
            name: model.learned[name]
            for name in TRAINABLE.of_chain(config.pruner)
            if not trained_inside(model, name)
        }
        self._prepare_soft_choice()
        self.freeze()
        self.unfreeze_parts()
        if config.dtype == "auto":
            _to_float32(self)
        if not tree_flatten(self.trainable_parameters()):
            raise UserError(f"nothing is left to learn in stage {config.stage}")

    def _prepare_soft_choice(self) -> None:
        """For a learned method that chooses tokens. Raises UserError where it cannot be trained."""
        step = self.pipeline.steps[-1]
        factors = [s.name for s in self.pipeline.steps if s.method.training_factor]
        if not (factors and self.trains("pruner")):
            return
        chain = self.pipeline
        if len(chain.steps) > 1 or chain.enhancers or step.stage != Stage.FEATURES:
            raise UserError(
                f"{factors[0]} learns alone, not in the chain {self.pipeline.spec}; train it first,"
                " or let it be by freeze: pruner"
            )
        if self.model.dtype == mx.float16:
            raise UserError(
                f"{step.name} learns by the attention that dropped tokens would get, which float16"
                " cannot hold; train in dtype bfloat16 or float32"
            )
        is_split = mx.distributed.init().size() > 1 or self.settings.grad_accumulation_steps > 1
        if step.method.training_loss and is_split:
            raise UserError(
                f"{step.name} learns from whole batches: in one process, without"
                " grad_accumulation_steps"
            )
        self.model.language.forward_pass = OthersBias

    def trains(self, part: str) -> bool:
        """Does a part learn?"""
        return trains(self.settings, part)

    def unfreeze_parts(self) -> None:
        """Make trainable what the stage trains."""
        model, c = self.model, self.settings
        if self.trains("projector"):
            model.projector.unfreeze()
        if self.trains("tower"):
            _unfreeze_tower(model)
        if self.trains("language") or (c.language_layers and "language" not in c.freeze):
            _unfreeze_language(model, c.language_layers)
        if self.trains("pruner"):
            for weights in self.pruners.values():
                weights.unfreeze()
            if any(trained_inside(model, name) for name in TRAINABLE.of_chain(c.pruner)):
                model.pruner.unfreeze()

    def begin_step(self, iteration: int, iters: int) -> None:
        """Step `iteration` of `iters`, counted from 0, comes next: what changes from step to step
        follows from these two."""
        self.iteration, self.iters = iteration, iters

    def saved_parameters(self) -> dict[str, mx.array]:
        """What a checkpoint holds: what the optimizer moves, and what the loss itself moves."""
        trainable: Any = tree_flatten(self.trainable_parameters())
        saved = dict(trainable)
        if self.trains("pruner"):
            every: Any = tree_flatten(self.parameters())
            saved |= {name: array for name, array in every if name.startswith("pruners.")}
        return saved

    def save_adapters(self, folder: Path, iteration: int) -> None:
        """What a user loads afterwards, ahead of the checkpoint of this step."""

    def save_model(self, folder: Path) -> None:
        """Write the model that the last step leaves, for a user to load."""
        learned = {name: dict(_flat(weights)) for name, weights in self.pruners.items()}
        others = self.model.learned.keys() - TRAINABLE.of_chain(self.settings.pruner)
        if others and tree_flatten(self.model.trainable_parameters()):
            logger.warning(
                "%s: trained for what the model was before; train them again",
                ", ".join(sorted(others)),
            )
        save_model(self.model, learned if self.trains("pruner") else {}, self.settings, folder)

    def moved_by_loss(self) -> dict[str, mx.array]:
        """What the loss itself moves, beside the optimizer."""
        trainable: Any = dict(tree_flatten(self.trainable_parameters()))
        saved = self.saved_parameters()
        return {name: array for name, array in saved.items() if name not in trainable}

    def loss(self, batch: Batch) -> mx.array:
        """What learning lowers, summed over the answers' tokens; in evaluation, behind the pruner
        as it is used."""
        return self.losses(batch)[0]

    def losses(self, batch: Batch) -> tuple[mx.array, mx.array]:
        """The same, and the part of it that is the answers' cross-entropy."""
        step = self.pipeline.steps[-1]
        is_soft = self.training and step.method.training_factor and self.trains("pruner")
        if is_soft and batch.pixels_IHW3 is not None:
            return factor_loss(self.model, batch, step, self._budget(), self._noise())
        loss = answer_loss(self.model, batch, self.pipeline, self.K)
        return loss, loss

    def answers(
        self, questions: ShortQuestions, ends: Collection[int], most: int, is_pruned: bool
    ) -> list[list[int]]:
        """What the model says, greedily, in `most` tokens, up to an end: token ids."""
        model = self.model
        pipeline, K = (self.pipeline, self.K) if is_pruned else (plan("none", {}), model.N)
        prefill = model(questions.prompts, pixels(questions, model.dtype), pipeline, K)
        return greedy_answers(prefill, ends, most)

    def _budget(self) -> int:
        """Of this step."""
        budget_of = self.pipeline.steps[-1].method.training_budget
        return min(self.model.N, budget_of(self.K, self.iteration))

    def _noise(self) -> float:
        """Of the scores in this step: it falls to zero."""
        return self.settings.noise * falling(self.iteration, self.iters)


def _to_float32(learner: Learner) -> None:
    """What learns: in half precision small steps would be rounded away."""
    trainable: Any = tree_flatten(learner.trainable_parameters())
    learner.load_weights([(k, x.astype(mx.float32)) for k, x in trainable], strict=False)


def _flat(module: nn.Module) -> Any:
    return tree_flatten(module.parameters())


def _unfreeze_tower(model: VLM) -> None:
    """What visual tokens are made of: a CLIP's last norm and later layers are held and not used."""
    if model.config.quantization and model.config.quantization.tower:
        raise UserError(
            "the vision tower is quantized, so it cannot learn; undo -q by"
            " mlx-vlm-prune convert to-mlx --dequantize"
        )
    model.tower.unfreeze()
    for layer in model.tower.encoder.layers[model.config.vision.depth :]:
        layer.freeze()
    if not isinstance(model.config.vision, SiglipConfig):
        model.tower.post_layernorm.freeze()


def _unfreeze_language(model: VLM, layers: int | None) -> None:
    """The last `layers`, or all of the language model. Raises UserError where it is quantized."""
    language = model.language
    if model.config.quantization:
        raise UserError(
            "the language model is quantized, so it cannot learn; train adapters (stage lora), or"
            " undo -q by mlx-vlm-prune convert to-mlx --dequantize"
        )
    if layers is None:
        language.unfreeze()
        return
    if not 1 <= layers <= language.depth:
        raise UserError(f"language_layers is {layers}; the model has {language.depth}")
    last: Any = language.layers[-layers:]
    for layer in last:
        (layer.wrapped if isinstance(language, MlxLm) else layer).unfreeze()
