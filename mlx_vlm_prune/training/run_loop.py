"""The loop of a run, as in MLX so in the reference: steps, reports, evaluations, checkpoints.

A step is decided by the seed and its number alone, so a run that goes on from a checkpoint takes
the steps that it would have taken.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoints.errors import UserError
from .batches import Reader, Sampler
from .config import TrainConfig
from .interrupts import StopRequest
from .run_state import Progress, checkpoint_folders

logger = logging.getLogger("mlx_vlm_prune")
Report = Mapping[str, float]


@dataclass(frozen=True)
class StepSums:
    """What the batches of a step gave, over all of the answers' tokens."""

    loss: float = 0.0  # of the answers
    side_loss: float = 0.0  # what else a learned method lowers
    answer_tokens: int = 0
    tokens: int = 0  # of everything read


@dataclass
class RunLoop:
    """A run under way.

    `on_report` is called with the figures of every report, `on_step` with the seconds of a step.
    `evaluated` are the steps behind which the held-out examples were read already.
    """

    config: TrainConfig
    learner: Any
    data: Reader
    valid: Reader | None
    processes: Any  # an Agreement that sums gradients as well
    on_report: Callable[[Report], None] = lambda report: None
    on_step: Callable[[float], None] = lambda seconds: None
    progress: Progress = field(default_factory=Progress)
    evaluated: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        c, dataset = self.config, self.data.dataset
        size = c.batch_size * self.processes.size
        self.order = Sampler(len(dataset), size, c.seed, dataset.blocks)
        self.stop = StopRequest(self.processes.size)
        self.is_saved = True
        self.seconds, self.steps, self.tokens = 0.0, 0, 0  # since the last report

    def take_step(self, iteration: int) -> StepSums:
        """One update. Raises UserError, with the weights and the optimizer as they were."""
        raise NotImplementedError

    def restore(self, folder: Path) -> Progress:
        """Take over the weights and the optimizer of a checkpoint. Raises UserError."""
        raise NotImplementedError

    def write_checkpoint(self) -> None:
        """Of `progress`; what is there already stays. Raises UserError."""
        raise NotImplementedError

    def evaluate(self) -> Report | None:
        """Figures of the held-out examples; None where it was stopped. Raises UserError."""
        raise NotImplementedError

    def figures(self) -> Report:
        """Of a report, beside those of every framework."""
        raise NotImplementedError

    @property
    def iters(self) -> int:
        """How many steps the run takes."""
        if self.config.iters:
            return self.config.iters
        return max(1, math.ceil((self.config.epochs or 1) * self.order.examples / self.at_once))

    @property
    def at_once(self) -> int:
        """How many examples a step reads."""
        return self.order.batch_size * self.config.grad_accumulation_steps

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""
        return self.progress.iteration * self.at_once / self.order.examples

    def run(self) -> None:
        """Take the steps that are left. Raises UserError where the loss is no number.

        Ctrl-C and SIGTERM write a checkpoint of the last step and raise KeyboardInterrupt. Where a
        step cannot be taken, one of the steps before it is written.
        """
        with self.stop.on_signals():
            self._evaluate_if_due()
            while self.progress.iteration < self.iters and not self.stop.is_set:
                begin = time.perf_counter()
                self._advance()
                self.on_step(time.perf_counter() - begin)
                self._report_if_due()
                done = self.progress.iteration
                if done % self.config.save_every == 0 or done == self.iters:
                    self.save()
                self._evaluate_if_due()
            if self.stop.is_set and not self.is_saved:
                self.save()
        if self.stop.is_set:
            raise KeyboardInterrupt
        with self.processes.together():
            if self.processes.is_first:
                self.learner.save_model(self.config.folder)

    def resume(self) -> None:
        """Go on from the newest checkpoint, if there is one. Raises UserError."""
        folder = self.config.folder
        with self.processes.together():
            if folders := checkpoint_folders(folder):
                self.progress = self.restore(folders[-1])
                self._check_continued(folders[-1])
        done = self.progress.iteration
        with self.processes.together():
            if self.processes.sum([done])[0] != done * self.processes.size:
                raise UserError(
                    f"the processes find other checkpoints in {folder}; it must be one folder that"
                    " all machines share"
                )
        if self.config.resume and not done:
            logger.info("there is no checkpoint in %s: the run begins at step 1", folder)
        self.data.bad.update(dict.fromkeys(self.progress.bad, ""))
        self.data.cut.update(self.progress.cut)

    def _check_continued(self, folder: Path) -> None:
        """UserError where the restored run had other processes or examples."""
        p, size, examples = self.progress, self.processes.size, self.order.examples
        if p.processes != size:
            raise UserError(
                f"{folder} was written by {p.processes} processes; a run goes on with as many, not"
                f" with {size}"
            )
        if p.examples not in (0, examples):
            raise UserError(
                f"{folder} was written with {p.examples} examples; a run goes on with the same,"
                f" and {self.config.data} has {examples}"
            )

    def _advance(self) -> None:
        """One step, counted."""
        begin = time.perf_counter()
        try:
            step = self.take_step(self.progress.iteration)
        except (UserError, SystemExit):  # in all processes
            if not self.is_saved:
                with suppress(UserError):
                    self.save()
            raise
        self.seconds += time.perf_counter() - begin
        self.steps, self.tokens, self.is_saved = self.steps + 1, self.tokens + step.tokens, False
        p = self.progress
        self.progress = replace(
            p, iteration=p.iteration + 1, trained_tokens=p.trained_tokens + step.answer_tokens,
            loss=p.loss + step.loss, side_loss=p.side_loss + step.side_loss,
            loss_tokens=p.loss_tokens + step.answer_tokens,
        )  # fmt: skip

    def step(self, iteration: int) -> tuple[float, int]:
        """One update; the mean loss of an answer's token, and how many there were."""
        step = self.take_step(iteration)
        return step.loss / max(1, step.answer_tokens), step.answer_tokens

    def check_finite(self, iteration: int, loss: float, norm: float) -> None:
        """UserError where a step's mean loss or its gradient's length is no number."""
        for name, value in (("loss", loss), ("gradient's norm", norm)):
            if not math.isfinite(value):
                raise UserError(
                    f"the {name} of step {iteration + 1} is {value}, so nothing of it was saved;"
                    f" it read the examples {self._examples(iteration)}: try a lower learning_rate,"
                    " with resume"
                )

    def indices(self, iteration: int, part: int) -> np.ndarray:
        """The examples of one of a step's batches, over all processes."""
        return self.order.indices(iteration * self.config.grad_accumulation_steps + part)

    def _examples(self, iteration: int) -> str:
        parts = range(self.config.grad_accumulation_steps)
        numbers = [int(i) + 1 for part in parts for i in self.indices(iteration, part)]
        return ", ".join(map(str, sorted(numbers)))

    def _report_if_due(self) -> None:
        p = self.progress
        if p.iteration % self.config.steps_per_report and p.iteration != self.iters:
            return
        if not p.trained_tokens:
            self._check_usable()
        self.progress = replace(p, loss=0.0, side_loss=0.0, loss_tokens=0)
        steps_per_second, count = self.steps / self.seconds, max(1, p.loss_tokens)
        self._send({
            "iteration": p.iteration,
            "train_loss": p.loss / count,
            **({"side_loss": p.side_loss / count} if p.side_loss else {}),
            "iterations_per_second": steps_per_second,
            "tokens_per_second": self.tokens / self.seconds,
            "trained_tokens": p.trained_tokens,
            "epoch": self.epoch,
            "seconds_left": (self.iters - p.iteration) / steps_per_second,
            **self.figures(),
        })  # fmt: skip
        self.seconds, self.steps, self.tokens = 0.0, 0, 0

    def _check_usable(self) -> None:
        """UserError where no example gave a token to learn, in the run or in all of the data."""
        n = self.order.examples
        is_last = self.progress.iteration == self.iters
        if len(self.processes.union(self.data.bad, n)) == n or is_last:
            raise UserError(f"no example of {self.config.data} can be used, so nothing was learned")

    def _send(self, report: Report) -> None:
        with self.processes.together():
            self.on_report(report)

    def _evaluate_if_due(self) -> None:
        done = self.progress.iteration
        is_due = done % self.config.steps_per_eval == 0 or done == self.iters
        if not is_due or done in self.evaluated or not self.valid or self.stop.is_set:
            return
        begin = time.perf_counter()
        if figures := self.evaluate():
            self.evaluated.add(done)
            self._send({"iteration": done, **figures, "val_time": time.perf_counter() - begin})

    def save(self) -> None:
        """Write what a user loads, then the checkpoint: where it is, the other is as well."""
        n, processes = self.order.examples, self.processes
        self.progress = replace(
            self.progress, processes=processes.size, examples=n,
            bad=sorted(processes.union(self.data.bad, n)),
            cut=sorted(processes.union(self.data.cut, n)),
        )  # fmt: skip
        with processes.together():
            if processes.is_first:
                self.learner.save_adapters(self.config.folder, self.progress.iteration)
                self.write_checkpoint()
        self.is_saved = True
