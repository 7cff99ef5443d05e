"""The requests that are not answered yet: how many, since when, and what they hold of memory."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from .refusals import CLIENT_GONE, RequestRefusedError

TOO_MUCH = "the requests so far hold as much memory as the server gives them; try again later"
OVER = "nobody waits for the request any more"


@dataclass(eq=False)
class OpenRequest:
    """A request from its first byte to the last one of its answer, which must come within
    `seconds`."""

    all: "OpenRequests"
    seconds: float
    start: float = field(default_factory=time.perf_counter)
    nbytes: int = 0
    is_over: bool = False

    @property
    def age(self) -> float:
        """Seconds since its first byte."""
        return time.perf_counter() - self.start

    @property
    def seconds_left(self) -> float:
        """Until its answer must be complete; at least 0."""
        return max(0.0, self.seconds - self.age)

    def check(self) -> None:
        """Raises RequestRefusedError in a thread that still reads a request that is over."""
        if self.is_over:
            raise RequestRefusedError(OVER, CLIENT_GONE)

    def hold(self, nbytes: int) -> None:
        """It holds so many bytes now, in place of those before. Raises RequestRefusedError, also as
        `check` does."""
        with self.all.lock:
            self.check()
            before, self.nbytes = self.nbytes, nbytes
            self.all.nbytes += nbytes - before
            is_too_much = nbytes > before and self.all.nbytes > self.all.most_bytes
            is_alone = self.all.nbytes == nbytes
        if is_too_much and is_alone:
            most = self.all.most_bytes // 1_000_000
            raise RequestRefusedError(f"what it shows takes more than {most} MB in memory", 413)
        if is_too_much:
            raise RequestRefusedError(TOO_MUCH, 429)

    def end(self) -> None:
        """It holds nothing, now and later."""
        with self.all.lock:
            self.all.nbytes -= self.nbytes
            self.nbytes, self.is_over = 0, True


class OpenRequests:
    """`most` requests at once, which hold `most_bytes` together."""

    def __init__(self, most: int, most_bytes: int) -> None:
        self.most, self.most_bytes = most, most_bytes
        self.count, self.nbytes, self.lock = 0, 0, threading.Lock()

    @property
    def is_full(self) -> bool:
        """Is there no place for another?"""
        return self.count >= self.most

    @contextmanager
    def open(self, seconds: float) -> Iterator[OpenRequest]:
        """A request's place until the end of the block."""
        request = OpenRequest(self, seconds)
        self.count += 1
        try:
            yield request
        finally:
            request.end()
            self.count -= 1
