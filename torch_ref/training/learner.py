"""What learns in a stage: which parameters move, and the loss that moves them.

The twin of mlx_vlm_prune/training/learner.py: the same parameters under the same names.
"""

import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mlx_vlm_prune.checkpoints.checkpoint import Checkpoint
from mlx_vlm_prune.checkpoints.config import CLIPConfig, SiglipConfig
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.checkpoints.reading.tensors import RawTensor
from mlx_vlm_prune.inputs.budget import budget, check_training_budget
from mlx_vlm_prune.training.batches import Batch
from mlx_vlm_prune.training.config import TrainConfig, check_reset
from mlx_vlm_prune.training.stage_rules import TrainableMethods, falling, trains
from mlx_vlm_prune.training.trained_folder import with_trained, write_trained
from mlx_vlm_prune.training.validation import ShortQuestions

from ..models.learned import parameter_name
from ..models.loading import to_tensor
from ..models.names import from_tensor, to_ours, to_reference
from ..models.vlm import VLM
from ..pruners import METHODS, is_learned
from ..pruners.spec import PRESETS, parse_steps, positions
from .loss import answer_loss, factor_loss, pixels

MODEL, PRUNERS, POOL = "model.", "pruners.", "attention_pool"
TRAINABLE = TrainableMethods(METHODS, lambda n: is_learned(n) and n != "twig", PRESETS)


class Chain(NamedTuple):
    """What the budget depends on."""

    spec: str
    trained_tokens: int | None = None
    fixed: int | None = None  # what a twig's rank comes to in the average layer

    def own_budget(self, N: int) -> int | None:
        return self.fixed


class Learner:
    """A model, of which some parts learn to answer behind a pruner.

    `parameters` are what learns, by name: the reference's of a part of the model, and MLX's of what
    lies beside it, in `beside`. `buffers` are what the loss itself moves.
    """

    training = True
    counts_answers = True  # evaluations count which answers are right

    def __init__(self, model: VLM, checkpoint: Checkpoint, where: Path, config: TrainConfig):
        TRAINABLE.check(config)
        self.model, self.checkpoint, self.where, self.config = model, checkpoint, where, config
        self.iteration, self.iters = 0, 1
        check_training_budget(model.N, config.keep_tokens)
        self.starts: dict[str, bool] = {}  # learned methods that learn: do they begin untrained?
        self.has_pool = model.pool is not None  # in MLX's model, where an untrained one's place is
        if self.trains("pruner"):
            self.add_untrained()
        self.K = self.budget()
        self.steps = model.pruning_steps(parse_steps(config.pruner, model.N, self.K), None, None)
        self._check_soft_choice()
        self.beside: dict[str, nn.Parameter] = {}
        self.buffers: dict[str, Tensor] = {}
        model.requires_grad_(False)
        self.unfreeze_parts()
        inside = {name: p for name, p in model.named_parameters() if p.requires_grad}
        apart = {id(p) for p in self.beside.values()}
        self.parameters = {n: p for n, p in inside.items() if id(p) not in apart} | self.beside
        if not self.parameters:
            raise UserError(f"nothing is left to learn in stage {config.stage}")

    def _check_soft_choice(self) -> None:
        """Raise UserError for a method that chooses tokens where it cannot be trained."""
        soft = [step for step in self.steps if step.training_factor]
        if not (soft and self.trains("pruner")):
            return
        if len(self.steps) > 1:
            raise UserError(
                f"{soft[0].name} learns alone, not in the chain {self.config.pruner}; train it"
                " first, or let it be by freeze: pruner"
            )
        size = int(os.environ.get("WORLD_SIZE", "1"))
        is_split = size > 1 or self.config.grad_accumulation_steps > 1
        if hasattr(soft[0].method, "training_loss") and is_split:
            raise UserError(
                f"{soft[0].name} learns from whole batches: in one process, without"
                " grad_accumulation_steps"
            )

    def trains(self, part: str) -> bool:
        """Does a part learn?"""
        return trains(self.config, part)

    def add_untrained(self) -> None:
        """Give the model weights, from the seed, of the chain's learned methods that it lacks;
        of all with `reset_pruner`."""
        model, c = self.model, self.config
        torch.manual_seed(c.seed)
        K = budget(model.N, c.keep_ratio, c.keep_tokens, Chain("random"))
        names = TRAINABLE.of_chain(c.pruner)
        check_reset(c, names)
        for name in names:
            self.starts[name] = c.reset_pruner or model.weights(name) is None
            if self.starts[name]:
                weights = METHODS[name].make_weights(model.feature_dims, K)
                if name == POOL and name not in model.learned and model.config.merge == (1, 1):
                    self.has_pool = True
                if name == POOL and model.pool is not None:
                    _replace_pool(model, weights.to(model.device))
                else:
                    model.learned[name] = weights.to(model.device)

    def budget(self) -> int:
        """How many of the N tokens stay; by default half, as many as a pool has, or all."""
        c = self.config
        spec = PRESETS.get(c.pruner, c.pruner)
        name = spec.split("+")[-1].partition(":")[0]
        pool = self.model.weights(name) if name == POOL else None
        fixed = self._budget_of_rank(spec) if name == "twig" else None
        chain = Chain(spec, None if pool is None else len(pool.pool_queries), fixed)
        K = budget(self.model.N, c.keep_ratio, c.keep_tokens, chain)
        return self.model.budget(name, K)

    def _budget_of_rank(self, spec: str) -> int | None:
        N, twig = self.model.N, self.model.weights("twig")
        return replace(parse_steps(spec, N, N)[-1], weights=twig).call("own_budget", twig, N)

    def unfreeze_parts(self) -> None:
        """Make trainable what the stage trains."""
        model, c = self.model, self.config
        if self.trains("projector"):
            model.projector.requires_grad_(True)
        if self.trains("tower"):
            _unfreeze_tower(model)
        if self.trains("language") or (c.language_layers and "language" not in c.freeze):
            _unfreeze_language(model, c.language_layers)
        for name in TRAINABLE.of_chain(c.pruner) if self.trains("pruner") else ():
            self._unfreeze_pruner(name)

    def _unfreeze_pruner(self, name: str) -> None:
        if name == POOL and self.model.pool is not None:
            for key, parameter in self.model.pool.named_parameters():
                parameter.requires_grad_(key.startswith("pool_"))
            if self.trains("projector"):
                self.model.projector.requires_grad_(True)
            return
        self.model.learned[name].requires_grad_(True)
        for key, value in self._named(name):
            if isinstance(value, nn.Parameter):
                self.beside[key] = value
            else:
                self.buffers[key] = value

    def _named(self, name: str) -> list[tuple[str, Tensor]]:
        """The weights that a method has beside the model, as MLX names them."""
        prefix = f"{MODEL}pruner." if name == POOL and self.has_pool else f"{PRUNERS}{name}."
        weights = self.model.learned.get(name, nn.Module())
        tensors = (*weights.named_parameters(), *weights.named_buffers())
        return [(prefix + parameter_name(key), value) for key, value in tensors]

    def train(self, mode: bool = True) -> None:
        """Or evaluate: without noise, and behind the pruner as it is used."""
        self.training = mode

    def begin_step(self, iteration: int, iters: int) -> None:
        """Step `iteration` of `iters`, counted from 0, comes next."""
        self.iteration, self.iters = iteration, iters

    def loss(self, batch: Batch) -> Tensor:
        """What learning lowers, summed over the answers' tokens."""
        return self.losses(batch)[0]

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The same, and the part of it that is the answers' cross-entropy."""
        step = self.steps[-1]
        is_soft = self.training and step.training_factor and self.trains("pruner")
        if is_soft and batch.pixels_IHW3 is not None:
            K = min(self.model.N, step.method.training_budget(self.K, self.iteration))
            noise = self.config.noise * falling(self.iteration, self.iters)
            return factor_loss(self.model, batch, step, K, noise)
        loss = answer_loss(self.model, batch, self.steps)
        return loss, loss

    def answers(
        self, questions: ShortQuestions, ends: Collection[int], most: int, is_pruned: bool
    ) -> list[list[int]]:
        """What the model says, greedily, in `most` tokens, up to an end: token ids."""
        steps = self.steps if is_pruned else self.model.pruning_steps("none", None, None)
        images = pixels(questions, self.model.device)
        read = self.model.embed(questions.prompts, images, steps, None, positions(steps))
        return self.model.generate(*read, most, ends)

    def saved(self) -> dict[str, RawTensor]:
        """What a checkpoint holds: what the optimizer moves, and what the loss itself moves."""
        return self.to_ours({**self.parameters, **self.buffers})

    def tensors(self) -> dict[str, RawTensor]:
        """Everything that is there: the model, and what lies beside it."""
        apart = {id(p) for p in self.beside.values()}
        inside = {
            name.replace(".linear.", "."): p  # of an adapter's matrix, which may have moved
            for name, p in self.model.named_parameters()
            if id(p) not in apart
        }
        frozen = {
            n: p for name in TRAINABLE.of_chain(self.config.pruner) for n, p in self._named(name)
        }
        named = self.to_ours({**inside, **self.beside, **self.buffers})
        return {name: from_tensor(p) for name, p in frozen.items()} | named

    def to_ours(self, values: Mapping[str, Tensor]) -> dict[str, RawTensor]:
        """Numbers of all parameters, as MLX's learner names and arranges them."""
        apart = self.beside.keys() | self.buffers.keys()
        inside = {name: value for name, value in values.items() if name not in apart}
        named = to_ours(inside, self.checkpoint.config, self.where)
        raw = {name: from_tensor(value) for name, value in values.items() if name in apart}
        return {MODEL + name: tensor for name, tensor in named.items()} | raw

    def to_reference(self, tensors: Mapping[str, RawTensor]) -> dict[str, Tensor]:
        """The way back."""
        apart = self.beside.keys() | self.buffers.keys()
        inside = {n.removeprefix(MODEL): t for n, t in tensors.items() if n not in apart}
        named = to_reference(inside, self.checkpoint.config, self.where)
        raw = {name: tensor for name, tensor in tensors.items() if name in apart}
        return {name: to_tensor(tensor) for name, tensor in {**named, **raw}.items()}

    def save_adapters(self, folder: Path, iteration: int) -> None:
        """What a user loads afterwards, ahead of the checkpoint of this step."""

    def save_model(self, folder: Path) -> None:
        """Write the model that the last step leaves, for a user to load."""
        moved: dict[str, RawTensor] = {}
        learned: dict[str, dict[str, RawTensor]] = {}
        for name, tensor in self.saved().items():
            if name.startswith(MODEL):
                moved[name.removeprefix(MODEL)] = tensor
            else:
                method, _, parameter = name.removeprefix(PRUNERS).partition(".")
                learned.setdefault(method, {})[parameter] = tensor
        K = len(self.model.weights(POOL).pool_queries) if self.has_pool else None
        trained = with_trained(self.checkpoint, moved, learned, K)
        write_trained(trained, self.config, folder)


def _replace_pool(model: VLM, weights: nn.Module) -> None:
    """Put a pool's weights into the model in place of those inside; they may be for another K."""
    pool, queries = model.pool, weights.get_parameter("pool_queries")
    assert pool is not None
    pool.pool_queries = queries
    for name, layer in weights.named_children():
        setattr(pool, name, layer)
    model.config = replace(model.config, pruner=(POOL, len(queries)))


def _unfreeze_tower(model: VLM) -> None:
    """What visual tokens are made of: a CLIP's last norm and later layers are held and not used."""
    vision: CLIPConfig | SiglipConfig = model.config.vision
    model.tower.requires_grad_(True)
    for layer in model.tower.encoder.layers[vision.depth :]:
        layer.requires_grad_(False)
    if not isinstance(vision, SiglipConfig):
        model.tower.post_layernorm.requires_grad_(False)


def _unfreeze_language(model: VLM, layers: int | None) -> None:
    """The last `layers`, or all of the language model. Raises UserError."""
    language = model.language
    if layers is None:
        language.requires_grad_(True)
        return
    depth = len(language.layers)
    if not 1 <= layers <= depth:
        raise UserError(f"language_layers is {layers}; the model has {depth}")
    for layer in language.layers[depth - layers :]:
        layer.requires_grad_(True)
