"""A run in MLX: read a batch, take the loss's gradients, move the weights."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx import optimizers as optim
from mlx.utils import tree_map

from ..checkpoints.errors import UserError
from ..machine.hardware import on_cpu
from . import checkpoints
from .batches import AHEAD, Batch
from .optimizer import make_optimizer
from .run_loop import Report, RunLoop, StepSums
from .run_state import Progress
from .validation import validate


@dataclass
class Trainer(RunLoop):
    """A run under way."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.learner.train()
        self.optimizer = make_optimizer(self.config)
        self.optimizer.init(self.learner.trainable_parameters())
        self.loss_and_gradients = nn.value_and_grad(
            self.learner, lambda batch: self.learner.losses(batch)
        )

    def restore(self, folder: Path) -> Progress:
        return checkpoints.restore(folder, self.learner, self.optimizer, self.config)

    def write_checkpoint(self) -> None:
        c = self.config
        checkpoints.save(c.folder, self.learner, self.optimizer, self.progress, c)

    def take_step(self, iteration: int) -> StepSums:
        # Each process draws noise and dropout of its own; the first what one alone would draw.
        mx.random.seed(self.config.seed + iteration + (self.processes.rank << 32))
        self.learner.begin_step(iteration, self.iters)
        moved_by_loss = self.learner.moved_by_loss()
        try:
            step, gradients = self._gradients(iteration)
            if not step.answer_tokens:
                return step
            gradients = tree_map(lambda gradient: gradient / step.answer_tokens, gradients)
            gradients, norm = optim.clip_grad_norm(gradients, self.config.grad_clip or math.inf)
            loss = (step.loss + step.side_loss) / step.answer_tokens
            self.check_finite(iteration, loss, norm.item())
        except UserError:
            self.learner.load_weights(list(moved_by_loss.items()), strict=False)
            raise
        self.optimizer.update(self.learner, gradients)
        mx.eval(self.learner.trainable_parameters(), self.optimizer.state)
        return step

    def _gradients(self, iteration: int) -> tuple[StepSums, Any]:
        """Of all processes' batches. Raises UserError, in all processes or none."""
        total, answers, count, tokens = mx.array(0.0), mx.array(0.0), 0, 0
        gradients: Any = None
        with self.processes.together():
            for part in range(self.config.grad_accumulation_steps):
                if (batch := self.batch(iteration, part)) is None:
                    continue
                (loss, of_answers), of_batch = self.loss_and_gradients(batch)
                total, answers = total + loss, answers + of_answers
                count, tokens = count + batch.answer_tokens, tokens + batch.tokens
                gradients = of_batch if gradients is None else tree_map(mx.add, gradients, of_batch)
                mx.eval(total, answers, gradients)
        if gradients is None:
            gradients = tree_map(mx.zeros_like, self.learner.trainable_parameters())
        side = (total - answers).item()
        loss, side, count, tokens, stops = self.processes.sum(
            [answers.item(), side, count, tokens, self.stop.is_requested]
        )
        self.stop.stop_together(stops)
        if count:
            gradients = self.processes.sum_gradients(gradients)
        return StepSums(loss, side, int(count), int(tokens)), gradients

    def batch(self, iteration: int, part: int) -> Batch | None:
        """This process's share of a batch of a step. On a GPU those that come next are read
        meanwhile; on a CPU that gains nothing, since steps use all its cores."""
        parts = self.config.grad_accumulation_steps
        number = iteration * parts + part
        last = min(number + (0 if on_cpu() else AHEAD), self.iters * parts - 1)
        indices = (self.indices(*divmod(n, parts)) for n in range(number, last + 1))
        share, *ahead = map(self.processes.share, indices)
        return self.data.batch(share, ahead)

    def figures(self) -> Report:
        return {
            "learning_rate": self.optimizer.learning_rate.item(),
            "peak_memory": mx.get_peak_memory() / 1e9,
        }

    def evaluate(self) -> Report | None:
        assert self.valid is not None
        c = self.config
        return validate(
            self.learner, self.valid, c.batch_size, c.val_batches, self.processes,
            lambda: self.stop.is_set,
        )  # fmt: skip
