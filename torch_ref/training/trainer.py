"""A run in PyTorch: read a batch, take the loss's gradients, move the weights.

The twin of mlx_vlm_prune/training/trainer.py, on a CPU bit for bit the same when it goes on.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.training.batches import Batch, in_order
from mlx_vlm_prune.training.run_loop import Report, RunLoop, StepSums
from mlx_vlm_prune.training.run_state import Progress

from . import checkpoints
from .optimizers import clip, make_optimizer, make_schedule


@dataclass
class Trainer(RunLoop):
    """A run under way."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.parameters = list(self.learner.parameters.values())
        self.optimizer = make_optimizer(self.config, self.parameters)
        self.rate = make_schedule(self.config)

    def restore(self, folder: Path) -> Progress:
        return checkpoints.restore(folder, self.learner, self.optimizer, self.config)

    def write_checkpoint(self) -> None:
        checkpoints.save(self.learner, self.optimizer, self.progress, self.config)

    def take_step(self, iteration: int) -> StepSums:
        # Each process draws noise and dropout of its own; the first what one alone would draw.
        torch.manual_seed(self.config.seed + iteration + (self.processes.rank << 32))
        self.learner.begin_step(iteration, self.iters)
        moved_by_loss = {name: b.clone() for name, b in self.learner.buffers.items()}
        try:
            step = self.backward(iteration)
            if not step.answer_tokens:
                return step
            gradients = [p.grad for p in self.parameters if p.grad is not None]
            self.processes.sum_gradients(gradients)
            for gradient in gradients:
                gradient.div_(step.answer_tokens)
            norm = clip(gradients, self.config.grad_clip or math.inf)
            self.check_finite(iteration, (step.loss + step.side_loss) / step.answer_tokens, norm)
        except UserError:
            for name, values in moved_by_loss.items():
                self.learner.buffers[name].copy_(values)
            raise
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(iteration)
        self.optimizer.step()
        return step

    def backward(self, iteration: int) -> StepSums:
        """Leave this process's gradients in the parameters; the sums of all processes.

        Raises UserError, in all processes or none.
        """
        total, answers, count, tokens = 0.0, 0.0, 0, 0
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        with self.processes.together():
            for part in range(self.config.grad_accumulation_steps):
                if (batch := self.batch(iteration, part)) is not None:
                    loss, of_answers = self.learner.losses(batch)
                    loss.backward()
                    total, answers = total + loss.item(), answers + of_answers.item()
                    count, tokens = count + batch.answer_tokens, tokens + batch.tokens
        loss_sum, side_sum, answer_tokens, read, stops = self.processes.sum(
            [answers, total - answers, count, tokens, self.stop.is_requested]
        )
        self.stop.stop_together(stops)
        return StepSums(loss_sum, side_sum, int(answer_tokens), int(read))

    def batch(self, iteration: int, part: int) -> Batch | None:
        """This process's share of a batch of a step."""
        return self.data.batch(self.processes.share(self.indices(iteration, part)))

    def figures(self) -> Report:
        device = self.learner.model.device
        memory = device.type == "cuda" and torch.cuda.max_memory_allocated(device) / 1e9
        return {
            "learning_rate": self.rate(self.progress.iteration - 1),
            **({"peak_memory": memory} if memory else {}),
        }

    @torch.no_grad()
    def evaluate(self) -> Report | None:
        """The mean loss of the held-out examples' answers, per token."""
        assert self.valid is not None
        c, total, count = self.config, 0.0, 0
        batches = [*in_order(len(self.valid.dataset), c.batch_size, c.val_batches)]
        self.learner.train(False)
        try:
            with self.processes.together():
                for indices in batches[self.processes.rank :: self.processes.size]:
                    if self.stop.is_set and self.processes.size == 1:
                        return None
                    if batch := self.valid.batch(indices):
                        total += self.learner.held_out_loss(batch).item()
                        count += batch.answer_tokens
        finally:
            self.learner.train()
        total, tokens = self.processes.sum([total, count])
        if not tokens:
            raise UserError("no held-out example can be used")
        return {"val_loss": total / tokens}
