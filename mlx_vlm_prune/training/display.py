"""What a user sees of a run: how long it takes, how it goes, and what has become of it."""

import sys
from collections.abc import Mapping, Sequence

from tqdm import tqdm

from .config import TrainConfig
from .run_loop import Report, RunLoop


def in_words(seconds: float) -> str:
    """A duration as `1 h 5 min`, `12 min`, `9 s`."""
    whole = max(1, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{round(whole / 60)} min"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def first_weights(starts: Mapping[str, bool]) -> str:
    """Which weights learned methods begin with; the values say whether untrained ones."""
    texts = {True: "again", False: "from the model's weights"}
    return "".join(f"; {name} starts {texts[is_new]}" for name, is_new in starts.items())


class Display:
    """Lines on stdout, and on a terminal a bar. Other processes than the first show nothing."""

    def __init__(self, config: TrainConfig, trainer: RunLoop):
        self.config, self.trainer = config, trainer
        self.is_shown = trainer.processes.is_first
        self.evaluation_seconds, self.timed_steps = 0.0, 0
        left, begin = trainer.iters, trainer.progress.iteration
        is_quiet = not (self.is_shown and sys.stderr and sys.stderr.isatty())
        self.bar = tqdm(total=left, initial=begin, unit="step", disable=is_quiet, leave=False)

    def say(self, lines: Sequence[str]) -> None:
        for line in lines if self.is_shown else ():
            if self.bar.disable:
                print(line, flush=True)
            else:
                self.bar.write(line, file=sys.stdout)

    def step(self, seconds: float) -> None:
        """Count a step; behind the first whose time says something, say how long the run takes."""
        self.bar.update()
        self.timed_steps += 1
        left = self.trainer.iters - self.trainer.progress.iteration
        if self.timed_steps == 2 or (self.timed_steps == 1 and left == 0):
            self.say([self.forecast(seconds, left)])

    def forecast(self, seconds: float, left: int) -> str:
        done, every = self.trainer.progress.iteration, self.config.steps_per_eval
        end = self.trainer.iters
        evaluations = -(-end // every) - done // every if self.trainer.valid else 0
        total = left * seconds + evaluations * self.evaluation_seconds
        s = "s" * (evaluations > 1)
        also = f", with {evaluations} evaluation{s}" if evaluations else ""
        return f"about {in_words(total)} for {left} more steps{also}: {seconds:.2g} s a step"

    def report(self, report: Report) -> None:
        """The figures of a report on one line."""
        self.evaluation_seconds = report.get("val_time", self.evaluation_seconds)
        text = _validation(report) if "val_loss" in report else _training(report)
        self.say([f"step {report['iteration']:.0f} of {self.trainer.iters}: {text}"])
        if "train_loss" in report:
            self.bar.set_postfix_str(f"loss {report['train_loss']:.3g}")

    def close(self) -> None:
        self.bar.close()


def _training(report: Report) -> str:
    left = report["seconds_left"]
    return (
        f"loss {report['train_loss']:.4g}, rate {report['learning_rate']:.2g},"
        f" {report['tokens_per_second']:,.0f} tokens/s"
        + (f", {report['peak_memory']:.3g} GB at most" if "peak_memory" in report else "")
        + (f", {in_words(left)} left" if left else "")
    )


def _validation(report: Report) -> str:
    text = f"held-out loss {report['val_loss']:.4g}"
    if "val_accuracy" in report:
        text += f", {report['val_accuracy']:.1%} of {report['val_questions']:.0f} answers right"
    if "val_accuracy_pruned" in report:
        text += f", {report['val_accuracy_pruned']:.1%} pruned"
    return text
