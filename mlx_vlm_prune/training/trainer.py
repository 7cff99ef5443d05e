"""The loop: read a batch, take the loss's slopes, move the weights; report, evaluate, save.

A step is decided by the seed and its number alone, so a run that goes on from a checkpoint takes
the steps that it would have taken.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx import optimizers as optim
from mlx.utils import tree_map

from ..checkpoints.errors import UserError
from . import checkpoints
from .batches import Batch, Order, Reader, in_order
from .config import TrainConfig
from .learner import Learner
from .run_state import Progress, checkpoint_folders

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
        self.optimizer = make_optimizer(c)
        self.optimizer.init(self.learner.trainable_parameters())
        self.slopes = nn.value_and_grad(self.learner, lambda batch: self.learner.loss(batch))

    @property
    def iters(self) -> int:
        """How many steps the run takes."""
        if self.config.iters:
            return self.config.iters
        c = self.config
        per_step = c.batch_size * c.grad_accumulation_steps
        return max(1, math.ceil((c.epochs or 1) * len(self.data.dataset) / per_step))

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
                f"{self.config.folder} holds checkpoints of a run; resume it, or give another place"
            )
        if folders:
            self.progress = checkpoints.restore(
                folders[-1], self.learner, self.optimizer, self.config
            )

    def _steps(self) -> None:
        c, started, losses, tokens = self.config, time.perf_counter(), 0.0, 0
        steps = 0
        while self.progress.iteration < self.iters:
            loss, count = self.step(self.progress.iteration)
            losses, tokens, steps = losses + loss * count, tokens + count, steps + 1
            done = self.progress.iteration + 1
            self.progress = Progress(done, self.progress.trained_tokens + count)
            is_last = done == self.iters
            if done % c.steps_per_report == 0 or is_last:
                seconds = time.perf_counter() - started
                self.on_report(self._figures(losses / tokens, tokens / seconds, steps / seconds))
                started, losses, tokens, steps = time.perf_counter(), 0.0, 0, 0
            if self.valid and (done % c.steps_per_eval == 0 or is_last):
                self.on_report({"iteration": done, "val_loss": self.evaluate()})
                started = time.perf_counter()
            if done % c.save_every == 0 or is_last:
                self.save()

    def step(self, iteration: int) -> tuple[float, int]:
        """One update; the mean loss of an answer's token, and how many there were."""
        mx.random.seed(self.config.seed + iteration)
        total, count, slopes = mx.array(0.0), 0, None
        for i in range(self.config.grad_accumulation_steps):
            batch = self.batch(iteration, i)
            if batch is None:
                continue
            loss, more = self.slopes(batch)
            total, count = total + loss, count + batch.answer_tokens
            slopes = more if slopes is None else tree_map(mx.add, slopes, more)
            mx.eval(total, slopes)
        if slopes is None:
            return 0.0, 0
        mean = float(total.item()) / count  # type: ignore[arg-type]
        if not math.isfinite(mean):
            raise UserError(
                f"the loss of step {iteration + 1} is {mean}; it read the examples"
                f" {self._examples(iteration)}: try a lower learning_rate"
            )
        slopes = tree_map(lambda slope: slope / count, slopes)
        if self.config.grad_clip:
            slopes, _ = optim.clip_grad_norm(slopes, self.config.grad_clip)
        self.optimizer.update(self.learner, slopes)
        mx.eval(self.learner.trainable_parameters(), self.optimizer.state)
        return mean, count

    def batch(self, iteration: int, part: int) -> Batch | None:
        number = iteration * self.config.grad_accumulation_steps + part
        return self.data.batch(self.order.indices(number))

    def _examples(self, iteration: int) -> str:
        parts = range(self.config.grad_accumulation_steps)
        first = iteration * len(parts)
        numbers = [int(i) + 1 for p in parts for i in self.order.indices(first + p)]
        return ", ".join(map(str, sorted(numbers)))

    def evaluate(self) -> float:
        """Mean loss of the held-out examples' answers, per token."""
        assert self.valid is not None
        total, count = 0.0, 0
        self.learner.eval()
        most = self.config.val_batches
        for indices in in_order(len(self.valid.dataset), self.config.batch_size, most):
            if batch := self.valid.batch(indices):
                total += float(self.learner.loss(batch).item())  # type: ignore[arg-type]
                count += batch.answer_tokens
        self.learner.train()
        return total / max(1, count)

    def save(self) -> None:
        """Write what a user loads, then the checkpoint: where it is, the other is as well."""
        self.learner.write(self.config.folder, self.progress.iteration)
        checkpoints.save(
            self.config.folder, self.learner, self.optimizer, self.progress, self.config
        )

    def _figures(self, loss: float, tokens: float, steps: float) -> Report:
        return {
            "iteration": self.progress.iteration,
            "train_loss": loss,
            "learning_rate": self.optimizer.learning_rate.item(),
            "tokens_per_second": tokens,
            "iterations_per_second": steps,
            "trained_tokens": self.progress.trained_tokens,
            "peak_memory": mx.get_peak_memory() / 1e9,
            "seconds_left": (self.iters - self.progress.iteration) / steps,
        }


def make_optimizer(config: TrainConfig) -> optim.Optimizer:
    """As the config names it. Raises UserError for settings that it does not take."""
    rate: Any = config.learning_rate
    if config.lr_schedule:
        rate = _schedule(config.lr_schedule)
    classes = {
        "adam": optim.Adam, "adamw": optim.AdamW, "muon": optim.Muon, "sgd": optim.SGD,
        "adafactor": optim.Adafactor,
    }  # fmt: skip
    settings = dict(config.optimizer_config.get(config.optimizer, config.optimizer_config))
    if config.optimizer in ("adam", "adamw"):  # as published and as PyTorch's; not MLX's default
        settings.setdefault("bias_correction", True)
    try:
        optimizer: optim.Optimizer = classes[config.optimizer](learning_rate=rate, **settings)
    except TypeError as e:
        raise UserError(f"optimizer_config does not suit {config.optimizer}: {e}") from None
    return optimizer


def _schedule(settings: Mapping[str, Any]) -> Any:
    from mlx_lm.tuner.utils import build_schedule

    try:
        return build_schedule(dict(settings))
    except (KeyError, AttributeError, TypeError, IndexError) as e:
        raise UserError(f"lr_schedule cannot be used ({type(e).__name__}: {e})") from None
