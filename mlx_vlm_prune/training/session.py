"""A run from its config to its summary, whichever framework trains."""

import logging
import shlex
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from ..checkpoints.errors import UserError
from ..machine.agreement import Agreement
from . import summary
from .config import TrainConfig
from .curve import draw_curve
from .display import Display
from .metrics import Metrics
from .run_folder import claimed
from .run_loop import Report, RunLoop
from .run_state import checkpoint_folders

logger = logging.getLogger("mlx_vlm_prune")
Send = Callable[[dict[str, Any]], None]


def train_together(
    config: TrainConfig,
    processes: Agreement,
    make_trainer: Callable[[], RunLoop],
    reporter: Callable[[TrainConfig], Send | None] = lambda config: None,
) -> None:
    """Train as the config says; `reporter` gives what sends every report elsewhere.

    Raises UserError for what cannot be trained or read.
    """
    with processes.mistakes_once(), ExitStack() as stack:
        with processes.together():
            if processes.is_first:
                stack.enter_context(claimed(config))
        begin = time.perf_counter()
        with processes.together():
            trainer = make_trainer()
        before = summary.fingerprints(trainer)
        trainer.resume()
        metrics = send = None
        with processes.together():
            if processes.is_first:
                metrics = Metrics(config.folder, trainer.progress.iteration)
                send = reporter(config)
        evaluated = metrics.evaluated if metrics else set()
        trainer.evaluated = processes.union(evaluated, trainer.progress.iteration + 1)
        display = Display(config, trainer)
        display.say(summary.opening(trainer, before))
        _run(trainer, display, metrics, send)
        if metrics:
            try:
                draw_curve(metrics, config.folder)
            except UserError as e:
                logger.info("%s", e)
            display.say(summary.closing(trainer, metrics, before, time.perf_counter() - begin))


def _run(trainer: RunLoop, display: Display, metrics: Metrics | None, send: Send | None) -> None:
    """The steps, with lines on the screen."""

    def report(figures: Report) -> None:
        if metrics:
            metrics.append(dict(figures))
            display.report(figures)
        if send:
            send(dict(figures))

    trainer.on_report, trainer.on_step = report, display.step
    try:
        trainer.run()
    except KeyboardInterrupt:
        display.close()
        display.say([_stopped(trainer)])
        raise
    finally:
        display.close()


def _stopped(trainer: RunLoop) -> str:
    """How to go on."""
    words = [word for word in sys.argv[1:] if word != "--resume"]
    command = shlex.join([*words, "--resume"]) if words else "--resume"
    folders = checkpoint_folders(trainer.config.folder)
    place = f"behind step {int(folders[-1].name)}" if folders else "before the first checkpoint"
    return f"stopped {place} of {trainer.iters}; the same command with --resume goes on: {command}"
