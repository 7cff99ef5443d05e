"""The socket of a server, which is had before a model is read, and the signal that ends it."""

import signal
import socket
from collections.abc import Callable
from typing import Any

from ..checkpoints.errors import UserError


def listen(host: str, port: int) -> socket.socket:
    """A socket for requests. Raises UserError where that address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=256)
    except (OSError, OverflowError, TypeError, UnicodeError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        raise UserError(f"host {host} and port {port} cannot be listened at: {reason}") from None


def expect_sigterm(server: Any, end: Callable[[], Any]) -> None:
    """SIGTERM calls `end` till a uvicorn server waits for it itself, and does nothing behind it:
    once uvicorn has ended, it sends the signal that ended it once more."""
    signal.signal(signal.SIGTERM, lambda *_: None if server.should_exit else end())
