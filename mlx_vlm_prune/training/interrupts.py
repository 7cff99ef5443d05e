"""Ctrl-C and SIGTERM ask a run to stop behind the step that it is taking."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

logger = logging.getLogger("mlx_vlm_prune")
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Whether the run is to stop.

    A signal reaches one process. Of several none may stop alone, since the others would wait for
    it for ever: they stop once they know of one another, see `stop_together`.
    """

    def __init__(self, processes: int = 1) -> None:
        self.alone = processes == 1
        self.is_requested = False  # of this process
        self.is_for_all = False

    @property
    def is_set(self) -> bool:
        return self.is_requested if self.alone else self.is_for_all

    def stop_together(self, requests: float) -> None:
        """Take over how many processes were asked to stop; all do so in the same step."""
        self.is_for_all = requests > 0

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Inside the block a signal sets it; a second one interrupts at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._set) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _set(self, number: int, frame: Any) -> None:
        if self.is_requested:
            raise KeyboardInterrupt
        self.is_requested = True
        logger.info("stopping after this step; once more stops at once, without a checkpoint of it")
