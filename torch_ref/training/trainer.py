"""The loop: read a batch, take the loss's slopes, move the weights; report, evaluate, save.

The twin of mlx_vlm_prune/training/trainer.py. A step is decided by the seed and its number alone,
so a run that goes on from a checkpoint takes the steps that it would have taken, on a CPU bit for
bit.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.training.batches import Batch, Order, Reader, in_order
from mlx_vlm_prune.training.config import TrainConfig
from mlx_vlm_prune.training.interrupts import StopRequest
from mlx_vlm_prune.training.run_state import Progress, checkpoint_folders

from . import checkpoints
from .learner import Learner
from .optimizers import clip, make_optimizer, make_schedule
from .processes import Processes

Report = Mapping[str, float]


@dataclass
class Trainer:
    """A run under way. `on_report` is called with the figures of every report."""

    config: TrainConfig
    learner: Learner
    data: Reader
    valid: Reader | None
    processes: Processes
    on_report: Callable[[Report], None] = lambda report: None
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        c = self.config
        dataset = self.data.dataset
        size = c.batch_size * self.processes.size
        self.order = Order(len(dataset), size, c.seed, dataset.blocks)
        self.parameters = list(self.learner.parameters.values())
        self.optimizer = make_optimizer(c, self.parameters)
        self.rate = make_schedule(c)
        self.stop = StopRequest(self.processes.size)
        self.seconds, self.steps = 0.0, 0  # since the last report

    @property
    def iters(self) -> int:
        """How many steps the run takes."""
        if self.config.iters:
            return self.config.iters
        per_step = self.order.batch_size * self.config.grad_accumulation_steps
        return max(1, math.ceil((self.config.epochs or 1) * self.order.examples / per_step))

    def run(self) -> None:
        """Take the steps that are left. Raises UserError where the loss is no number.

        Ctrl-C and SIGTERM write a checkpoint of the last step and raise KeyboardInterrupt.
        """
        is_saved = True
        with self.stop.on_signals():
            while self.progress.iteration < self.iters and not self.stop.is_set:
                self._advance()
                self._report_if_due()
                done, is_last = self.progress.iteration, self.progress.iteration == self.iters
                if is_saved := done % self.config.save_every == 0 or is_last:
                    self.save()
                if self.valid and (done % self.config.steps_per_eval == 0 or is_last):
                    self.on_report({"iteration": done, "val_loss": self.evaluate()})
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
        mean, count = self.step(self.progress.iteration)
        self.seconds, self.steps = self.seconds + time.perf_counter() - begin, self.steps + 1
        p = self.progress
        self.progress = replace(
            p, iteration=p.iteration + 1, trained_tokens=p.trained_tokens + count,
            loss=p.loss + mean * count, loss_tokens=p.loss_tokens + count,
        )  # fmt: skip

    def step(self, iteration: int) -> tuple[float, int]:
        """One update; the mean loss of an answer's token, and how many there were."""
        torch.manual_seed(self.config.seed + iteration)
        self.learner.begin_step(iteration, self.iters)
        loss, count = self.slopes(iteration)
        if not count:
            return 0.0, 0
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        self.processes.sum_slopes(gradients)
        for gradient in gradients:
            gradient.div_(count)
        norm = clip(gradients, self.config.grad_clip or math.inf)
        for name, value in (("loss", loss / count), ("gradient's norm", norm)):
            if not math.isfinite(value):
                raise UserError(
                    f"the {name} of step {iteration + 1} is {value}, so nothing of it was saved;"
                    f" it read the examples {self._examples(iteration)}: try a lower learning_rate"
                )
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(iteration)
        self.optimizer.step()
        return loss / count, count

    def slopes(self, iteration: int) -> tuple[float, int]:
        """Leave this process's slopes in the parameters; the summed loss of all processes, and of
        how many tokens. Raises UserError, in all processes or none."""
        total, count, fault = 0.0, 0, None
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        try:
            for part in range(self.config.grad_accumulation_steps):
                if (batch := self.batch(iteration, part)) is not None:
                    loss = self.learner.loss(batch)
                    loss.backward()
                    total, count = total + loss.item(), count + batch.answer_tokens
        except UserError as e:
            fault = e
        self.processes.agree(fault)
        total, tokens, stops = self.processes.sum([total, count, self.stop.is_requested])
        self.stop.agree(stops)
        return total, int(tokens)

    def batch(self, iteration: int, part: int) -> Batch | None:
        """This process's share of a batch of a step."""
        return self.data.batch(self.processes.share(self._indices(iteration, part)))

    def _indices(self, iteration: int, part: int) -> np.ndarray:
        return self.order.indices(iteration * self.config.grad_accumulation_steps + part)

    def _examples(self, iteration: int) -> str:
        parts = range(self.config.grad_accumulation_steps)
        numbers = [int(i) + 1 for part in parts for i in self._indices(iteration, part)]
        return ", ".join(map(str, sorted(numbers)))

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean loss of the held-out examples' answers, per token."""
        assert self.valid is not None
        c, total, count, fault = self.config, 0.0, 0, None
        batches = [*in_order(len(self.valid.dataset), c.batch_size, c.val_batches)]
        try:
            for indices in batches[self.processes.rank :: self.processes.size]:
                if batch := self.valid.batch(indices):
                    total += self.learner.held_out_loss(batch).item()
                    count += batch.answer_tokens
        except UserError as e:
            fault = e
        self.processes.agree(fault)
        total, tokens = self.processes.sum([total, count])
        return total / max(1, tokens)

    def save(self) -> None:
        """Write what a user loads, then the checkpoint: where it is, the other is as well."""
        self.progress = replace(
            self.progress, processes=self.processes.size, bad=sorted(self.data.bad),
            cut=sorted(self.data.cut),
        )  # fmt: skip
        if self.processes.is_first:
            self.learner.write(self.config.folder, self.progress.iteration)
            checkpoints.save(self.learner, self.optimizer, self.progress, self.config)

    def _report_if_due(self) -> None:
        p = self.progress
        if p.iteration % self.config.steps_per_report and p.iteration != self.iters:
            return
        self.progress = replace(p, loss=0.0, loss_tokens=0)
        steps_per_second = self.steps / self.seconds
        device = self.learner.model.device
        peak = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
        self.on_report({
            "iteration": p.iteration,
            "train_loss": p.loss / max(1, p.loss_tokens),
            "learning_rate": self.rate(p.iteration - 1),
            "iterations_per_second": steps_per_second,
            "trained_tokens": p.trained_tokens,
            **({} if peak is None else {"peak_memory": peak}),
            "seconds_left": (self.iters - p.iteration) / steps_per_second,
        })  # fmt: skip
        self.seconds, self.steps = 0.0, 0
