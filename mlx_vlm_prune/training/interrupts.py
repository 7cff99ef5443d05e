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
    """Whether the run is to stop."""

    def __init__(self) -> None:
        self.is_set = False

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
        if self.is_set:
            raise KeyboardInterrupt
        self.is_set = True
        logger.info("stopping after this step; once more stops at once, without a checkpoint of it")
