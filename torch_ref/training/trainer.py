"""The loop: read a batch, take the loss's slopes, move the weights; report, evaluate, save.

The twin of mlx_vlm_prune/training/trainer.py. A step is decided by the seed and its number alone,
so a run that goes on from a checkpoint takes the steps that it would have taken, on a CPU bit for
bit.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.training.batches import Batch, Order, Reader, in_order
from mlx_vlm_prune.training.config import TrainConfig
from mlx_vlm_prune.training.run_state import Progress, checkpoint_folders

from . import checkpoints
from .learner import Learner
from .optimizers import clip, make_optimizer, make_schedule

Report = Mapping[str, float]


@dataclass
class Trainer:
    """A run under way. `on_report` is called with the figures of every report."""

    config: TrainConfig
    learner: Learner
    data: Reader
    valid: Reader | None = None
    on_report: Callable[[Report], None] = lambda report: None
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        c = self.config
        self.order = Order(len(self.data.dataset), c.batch_size, c.seed)
        self.optimizer = make_optimizer(c, list(self.learner.parameters.values()))
        self.rate = make_schedule(c)

    @property
    def iters(self) -> int:
        """How many steps the run takes."""
        c = self.config
        per_step = c.batch_size * c.grad_accumulation_steps
        passes = math.ceil((c.epochs or 1) * len(self.data.dataset) / per_step)
        return c.iters or max(1, passes)

    def run(self) -> None:
        """Take the steps that are left. Raises UserError where the loss is no number.

        An interrupt writes a checkpoint and goes on to the caller.
        """
        self.resume()
        try:
            self._steps()
        except KeyboardInterrupt:
            self.save()
            raise

    def resume(self) -> None:
        """Go on from the newest checkpoint. Raises UserError for one, where `resume` is not set."""
        folders = checkpoint_folders(self.config.folder)
        if folders and not self.config.resume:
            raise UserError(
                f"{self.config.folder} holds checkpoints of a run; give resume, or another folder"
            )
        if folders:
            self.progress = checkpoints.restore(
                folders[-1], self.learner, self.optimizer, self.config
            )

    def _steps(self) -> None:
        c, started, losses, tokens, steps = self.config, time.perf_counter(), 0.0, 0, 0
        while self.progress.iteration < self.iters:
            loss, count = self.step(self.progress.iteration)
            losses, tokens, steps = losses + loss * count, tokens + count, steps + 1
            done = self.progress.iteration + 1
            self.progress = Progress(done, self.progress.trained_tokens + count)
            is_last = done == self.iters
            if done % c.steps_per_report == 0 or is_last:
                seconds = time.perf_counter() - started
                self.on_report(self._figures(losses / max(1, tokens), tokens, steps, seconds))
                started, losses, tokens, steps = time.perf_counter(), 0.0, 0, 0
            if self.valid and (done % c.steps_per_eval == 0 or is_last):
                self.on_report({"iteration": done, "val_loss": self.evaluate()})
                started = time.perf_counter()
            if done % c.save_every == 0 or is_last:
                self.save()

    def step(self, iteration: int) -> tuple[float, int]:
        """One update; the mean loss of an answer's token, and how many there were."""
        torch.manual_seed(self.config.seed + iteration)
        total, count = self.slopes(iteration)
        if not count:
            return 0.0, 0
        mean = total / count
        if not math.isfinite(mean):
            raise UserError(
                f"the loss of step {iteration + 1} is {mean}; it read the examples"
                f" {self._examples(iteration)}: try a lower learning_rate"
            )
        gradients = [p.grad for p in self.learner.parameters.values() if p.grad is not None]
        for gradient in gradients:
            gradient.div_(count)
        if self.config.grad_clip:
            clip(gradients, self.config.grad_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(iteration)
        self.optimizer.step()
        return mean, count

    def slopes(self, iteration: int) -> tuple[float, int]:
        """Leave the summed loss's slopes in the parameters; that loss, and of how many tokens."""
        self.optimizer.zero_grad(set_to_none=True)
        total, count = 0.0, 0
        for i in range(self.config.grad_accumulation_steps):
            batch = self.batch(iteration, i)
            if batch is not None:
                loss = self.learner.loss(batch)
                loss.backward()
                total, count = total + loss.item(), count + batch.answer_tokens
        return total, count

    def batch(self, iteration: int, part: int) -> Batch | None:
        number = iteration * self.config.grad_accumulation_steps + part
        return self.data.batch(self.order.indices(number))

    def _examples(self, iteration: int) -> str:
        parts = self.config.grad_accumulation_steps
        batches = [self.order.indices(iteration * parts + p).tolist() for p in range(parts)]
        return ", ".join(str(n + 1) for n in sorted(n for batch in batches for n in batch))

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean loss of the held-out examples' answers, per token."""
        assert self.valid is not None
        total, count, most = 0.0, 0, self.config.val_batches
        for indices in in_order(len(self.valid.dataset), self.config.batch_size, most):
            if batch := self.valid.batch(indices):
                total += self.learner.loss(batch).item()
                count += batch.answer_tokens
        return total / max(1, count)

    def save(self) -> None:
        """Write what a user loads, then the checkpoint: where it is, the other is as well."""
        self.learner.write(self.config.folder, self.progress.iteration)
        checkpoints.save(self.learner, self.optimizer, self.progress, self.config)

    def _figures(self, loss: float, tokens: int, steps: int, seconds: float) -> Report:
        figures = {
            "iteration": self.progress.iteration,
            "train_loss": loss,
            "learning_rate": self.rate(self.progress.iteration - 1),
            "tokens_per_second": tokens / seconds,
            "iterations_per_second": steps / seconds,
            "trained_tokens": self.progress.trained_tokens,
            "seconds_left": (self.iters - self.progress.iteration) * seconds / steps,
        }
        if torch.cuda.is_available():
            figures["peak_memory"] = torch.cuda.max_memory_allocated() / 1e9
        return figures
