"""What learns in a stage: which parameters move, and the loss that moves them.

The twin of mlx_vlm_prune/training/learner.py: the same parameters under the same names.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from mlx_vlm_prune.checkpoints.checkpoint import Checkpoint
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.checkpoints.reading.tensors import RawTensor
from mlx_vlm_prune.training.batches import Batch
from mlx_vlm_prune.training.config import TrainConfig

from ..models.loading import to_tensor
from ..models.names import from_tensor, to_ours, to_reference
from ..models.vlm import VLM
from ..pruners.spec import parse_steps
from .loss import answer_loss
from .saving import write_model

PREFIX = "model."  # of a tensor of the model, among those that a checkpoint holds


class Learner:
    """A model, of which some parts learn to answer behind a pruner.

    `parameters` are what learns, by the reference's names; those in `beside` are no part of the
    model, and have the names of MLX's learner already.
    """

    parts: Sequence[str] = ()  # of the model that the stage trains, unless `freeze` names them
    step = 0  # the number of the step under way

    def __init__(self, model: VLM, checkpoint: Checkpoint, where: Path, config: TrainConfig):
        self.model, self.checkpoint, self.where, self.config = model, checkpoint, where, config
        self.K = self.budget()
        self.steps = model.pruning_steps(parse_steps(config.pruner, model.N, self.K), None, None)
        self.beside: dict[str, nn.Parameter] = {}
        model.requires_grad_(False)
        self.unfreeze_parts()
        held = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.parameters = {name: p for name, p in held.items() if not _is_among(p, self.beside)}
        self.parameters |= self.beside
        if not self.parameters:
            raise UserError(f"nothing is left to learn in stage {config.stage}")

    def budget(self) -> int:
        """How many of the N tokens stay, by default half, and all without a pruner."""
        c, N = self.config, self.model.N
        name = c.pruner.split("+")[-1].partition(":")[0]
        K = c.keep_tokens
        if c.keep_ratio is not None:
            if K is not None or not 0 < c.keep_ratio <= 1:
                raise UserError("give keep_ratio, above 0 and at most 1, or keep_tokens")
            K = max(1, int(N * c.keep_ratio + 1e-9))
        pool = self.model.weights(name) if name == "attention_pool" else None
        usual = N if name == "none" else N // 2 if pool is None else len(pool.pool_queries)
        return self.model.budget(name, K if K is not None else max(1, usual))

    def unfreeze_parts(self) -> None:
        """Make trainable what the stage trains."""
        for part in self.parts:
            module = part_of(self.model, part)
            if part not in self.config.freeze and module is not None:
                module.requires_grad_(True)

    def loss(self, batch: Batch) -> Tensor:
        """Summed over the answers' tokens."""
        return answer_loss(self.model, batch, self.steps)

    def held_out_loss(self, batch: Batch) -> Tensor:
        """The same without what is there to learn from: noise, or other budgets."""
        return self.loss(batch)

    def to_ours(self, values: Mapping[str, Tensor]) -> dict[str, RawTensor]:
        """Numbers of all parameters, as MLX's learner names and arranges them."""
        inside = {name: value for name, value in values.items() if name not in self.beside}
        named = to_ours(inside, self.checkpoint.config, self.where)
        beside = {name: value for name, value in values.items() if name in self.beside}
        raw = {name: from_tensor(value) for name, value in beside.items()}
        return {PREFIX + name: tensor for name, tensor in named.items()} | raw

    def to_reference(self, tensors: Mapping[str, RawTensor]) -> dict[str, Tensor]:
        """The way back."""
        inside = {
            name.removeprefix(PREFIX): tensor
            for name, tensor in tensors.items()
            if name not in self.beside
        }
        named = to_reference(inside, self.checkpoint.config, self.where)
        beside = {name: tensor for name, tensor in tensors.items() if name in self.beside}
        return {name: to_tensor(tensor) for name, tensor in {**named, **beside}.items()}

    def write(self, folder: Path, iteration: int) -> None:
        """What a user loads afterwards, ahead of the checkpoint of this step."""
        named = self.to_ours({n: p for n, p in self.parameters.items() if n not in self.beside})
        moved = {name.removeprefix(PREFIX): tensor for name, tensor in named.items()}
        write_model(folder, self.checkpoint, moved, {}, self.config)


def _is_among(parameter: nn.Parameter, others: Mapping[str, nn.Parameter]) -> bool:
    return any(parameter is other for other in others.values())


def part_of(model: VLM, part: str) -> nn.Module | None:
    """A part by its name in `freeze`; None where this model has none."""
    if part == "pruner":
        return None if model.pool is None else _Pool(model.pool)
    module: nn.Module = getattr(model, part)
    return module


class _Pool(nn.Module):
    """The weights of a pool alone, beside which the projector lies."""

    def __init__(self, pool: nn.Module):
        super().__init__()
        for name, child in pool.named_children():
            if name.startswith("pool_"):
                self.add_module(name, child)
        self.register_parameter("pool_queries", pool.get_parameter("pool_queries"))


class Pretrain(Learner):
    """The projector learns what a language model reads (EfficientVLM's and LLaVA's first stage)."""

    parts = ("projector", "pruner")


class FineTune(Learner):
    """Projector, pruner and language model learn (EfficientVLM's second stage)."""

    parts = ("projector", "pruner", "language")
