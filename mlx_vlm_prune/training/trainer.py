"""The loop: read a batch, take the loss's slopes, move the weights; report, evaluate, save.

A step is decided by the seed and its number alone, so a run that goes on from a checkpoint takes
the steps that it would have taken.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx import optimizers as optim
from mlx.utils import tree_map

from ..checkpoints.errors import UserError
from ..machine.hardware import on_cpu
from . import checkpoints
from .batches import AHEAD, Batch, Order, Reader
from .config import TrainConfig
from .interrupts import StopRequest
from .learner import Learner
from .optimizer import make_optimizer
from .processes import Processes
from .run_state import Progress, checkpoint_folders
from .validation import validate

Report = Mapping[str, float]


@dataclass(frozen=True)
class Slopes:
    """What the batches of a step say: sums over their answers' tokens."""

    loss: float
    count: int  # of answers' tokens
    read: int  # tokens read
    gradients: Any


@dataclass
class Trainer:
    """A run under way.

    `on_report` is called with the figures of every report, `on_step` with the seconds of a step.
    `evaluated` are the steps behind which the held-out examples were read already.
    """

    config: TrainConfig
    learner: Learner
    data: Reader
    valid: Reader | None = None
    on_report: Callable[[Report], None] = lambda report: None
    on_step: Callable[[float], None] = lambda seconds: None
    processes: Processes = field(default_factory=Processes)
    progress: Progress = field(default_factory=Progress)
    evaluated: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        c = self.config
        self.learner.train()
        dataset = self.data.dataset
        size = c.batch_size * self.processes.size
        self.order = Order(len(dataset), size, c.seed, dataset.blocks)
        self.optimizer = make_optimizer(c)
        self.optimizer.init(self.learner.trainable_parameters())
        self.slopes = nn.value_and_grad(self.learner, lambda batch: self.learner.loss(batch))
        self.stop = StopRequest(self.processes.size)
        self.seconds, self.steps, self.read = 0.0, 0, 0  # since the last report

    @property
    def iters(self) -> int:
        """How many steps the run takes."""
        if self.config.iters:
            return self.config.iters
        per_step = self.order.batch_size * self.config.grad_accumulation_steps
        return max(1, math.ceil((self.config.epochs or 1) * self.order.examples / per_step))

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""
        per_step = self.order.batch_size * self.config.grad_accumulation_steps
        return self.progress.iteration * per_step / self.order.examples

    def run(self) -> None:
        """Take the steps that are left. Raises UserError where the loss is no number.

        Ctrl-C and SIGTERM write a checkpoint of the last step and raise KeyboardInterrupt.
        """
        is_saved = True
        with self.stop.on_signals():
            self._evaluate_if_due()
            while self.progress.iteration < self.iters and not self.stop.is_set:
                begin = time.perf_counter()
                self._advance()
                self.on_step(time.perf_counter() - begin)
                self._report_if_due()
                done, is_last = self.progress.iteration, self.progress.iteration == self.iters
                if is_saved := done % self.config.save_every == 0 or is_last:
                    self.save()
                self._evaluate_if_due()
            if self.stop.is_set and not is_saved:
                self.save()
        if self.stop.is_set:
            raise KeyboardInterrupt
        if self.processes.is_first:
            self.learner.finish(self.config.folder)

    def resume(self) -> None:
        """Go on from the newest checkpoint, if there is one. Raises UserError."""
        folders = checkpoint_folders(self.config.folder)
        if not folders:
            return
        progress = checkpoints.restore(folders[-1], self.learner, self.optimizer, self.config)
        if progress.processes != self.processes.size:
            raise UserError(
                f"{folders[-1]} was written by {progress.processes} processes; a run goes on with"
                f" as many, not with {self.processes.size}"
            )
        self.progress = progress
        self.data.bad.update(dict.fromkeys(progress.bad, ""))
        self.data.cut.update(progress.cut)

    def _advance(self) -> None:
        """One step, counted."""
        begin = time.perf_counter()
        loss, count, read = self._step(self.progress.iteration)
        self.seconds += time.perf_counter() - begin
        self.steps, self.read = self.steps + 1, self.read + read
        p = self.progress
        self.progress = replace(
            p, iteration=p.iteration + 1, trained_tokens=p.trained_tokens + count,
            loss=p.loss + loss, loss_tokens=p.loss_tokens + count,
        )  # fmt: skip

    def step(self, iteration: int) -> tuple[float, int]:
        """One update; the mean loss of an answer's token, and how many there were."""
        loss, count, _ = self._step(iteration)
        return loss / max(1, count), count

    def _step(self, iteration: int) -> tuple[float, int, int]:
        """One update; the summed loss, the tokens of answers, and all tokens read."""
        mx.random.seed(self.config.seed + iteration)
        self.learner.begin_step(iteration, self.iters)
        step = self._sum(self._read(iteration))
        if not step.count:
            return 0.0, 0, step.read
        slopes = tree_map(lambda slope: slope / step.count, step.gradients)
        slopes, norm = optim.clip_grad_norm(slopes, self.config.grad_clip or math.inf)
        for name, value in (("loss", step.loss / step.count), ("gradient's norm", norm.item())):
            if not math.isfinite(value):
                raise UserError(
                    f"the {name} of step {iteration + 1} is {value}, so nothing of it was saved;"
                    f" it read the examples {self._examples(iteration)}: try a lower learning_rate"
                )
        self.optimizer.update(self.learner, slopes)
        mx.eval(self.learner.trainable_parameters(), self.optimizer.state)
        return step.loss, step.count, step.read

    def _read(self, iteration: int) -> Slopes:
        """What this process's batches say. Raises UserError, the same in all processes or none."""
        total, count, read, slopes = mx.array(0.0), 0, 0, None
        fault = None
        try:
            for part in range(self.config.grad_accumulation_steps):
                if (batch := self.batch(iteration, part)) is None:
                    continue
                loss, more = self.slopes(batch)
                total, read = total + loss, read + batch.tokens
                count += batch.answer_tokens
                slopes = more if slopes is None else tree_map(mx.add, slopes, more)
                mx.eval(total, slopes)
        except UserError as e:
            fault = e
        self.processes.agree(fault)
        if slopes is None:
            slopes = tree_map(mx.zeros_like, self.learner.trainable_parameters())
        return Slopes(float(total.item()), count, read, slopes)  # type: ignore[arg-type]

    def _sum(self, step: Slopes) -> Slopes:
        """Over all processes; a stop is one of all."""
        loss, count, read, stops = self.processes.sum(
            [step.loss, step.count, step.read, self.stop.is_requested]
        )
        self.stop.agree(stops)
        gradients = self.processes.sum_slopes(step.gradients) if count else step.gradients
        return Slopes(loss, int(count), int(read), gradients)

    def batch(self, iteration: int, part: int) -> Batch | None:
        """This process's share of a batch of a step. On a GPU those that come next are read
        meanwhile; on a CPU that gains nothing, since steps use all its cores."""
        parts = self.config.grad_accumulation_steps
        number = iteration * parts + part
        last = min(number + (0 if on_cpu() else AHEAD), self.iters * parts - 1)
        indices = (self._indices(*divmod(n, parts)) for n in range(number, last + 1))
        share, *ahead = map(self.processes.share, indices)
        return self.data.batch(share, ahead)

    def _indices(self, iteration: int, part: int) -> np.ndarray:
        return self.order.indices(iteration * self.config.grad_accumulation_steps + part)

    def _examples(self, iteration: int) -> str:
        parts = range(self.config.grad_accumulation_steps)
        numbers = [int(i) + 1 for part in parts for i in self._indices(iteration, part)]
        return ", ".join(map(str, sorted(numbers)))

    def _report_if_due(self) -> None:
        p = self.progress
        if p.iteration % self.config.steps_per_report and p.iteration != self.iters:
            return
        rate = self.optimizer.learning_rate.item()
        self.progress = replace(p, loss=0.0, loss_tokens=0)
        steps_per_second = self.steps / self.seconds
        self.on_report({
            "iteration": p.iteration,
            "train_loss": p.loss / max(1, p.loss_tokens),
            "learning_rate": rate,
            "iterations_per_second": steps_per_second,
            "tokens_per_second": self.read / self.seconds,
            "trained_tokens": p.trained_tokens,
            "peak_memory": mx.get_peak_memory() / 1e9,
            "epoch": self.epoch,
            "seconds_left": (self.iters - p.iteration) / steps_per_second,
        })  # fmt: skip
        self.seconds, self.steps, self.read = 0.0, 0, 0

    def _evaluate_if_due(self) -> None:
        done = self.progress.iteration
        is_due = done % self.config.steps_per_eval == 0 or done == self.iters
        if not is_due or done in self.evaluated or not self.valid or self.stop.is_set:
            return
        begin = time.perf_counter()
        if figures := self.evaluate():
            self.evaluated.add(done)
            self.on_report({"iteration": done, **figures, "val_time": time.perf_counter() - begin})

    def evaluate(self) -> Report | None:
        """Figures of the held-out examples; None where it was stopped."""
        assert self.valid is not None
        c = self.config
        return validate(
            self.learner, self.valid, c.batch_size, c.val_batches, self.processes,
            lambda: self.stop.is_set,
        )  # fmt: skip

    def save(self) -> None:
        """Write what a user loads, then the checkpoint: where it is, the other is as well."""
        n, union = len(self.data.dataset), self.processes.union
        self.progress = replace(
            self.progress, processes=self.processes.size, bad=sorted(union(self.data.bad, n)),
            cut=sorted(union(self.data.cut, n)),
        )  # fmt: skip
        if self.processes.is_first:
            self.learner.write(self.config.folder, self.progress.iteration)
            checkpoints.save(
                self.config.folder, self.learner, self.optimizer, self.progress, self.config
            )
