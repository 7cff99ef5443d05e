"""Requests on one model of mlx-vlm's take turns, one piece of an answer after another.

mlx-vlm keeps a request's positions on the model, and what ends an answer on the tokenizer. So each
request gets back what it left there before a piece of it is computed. Generators that are read by
turns in one thread and generators in several threads give what each gives alone. A lock for the
whole of a request would never open in the first case.
"""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from threading import Lock, RLock
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import mlx.core as mx

from .host import Host

_locks: WeakValueDictionary[int, Any] = WeakValueDictionary()  # by the id of a model that is used
_locks_lock = Lock()
T = TypeVar("T")


class _WiredMemory:
    """The limit of memory that Metal keeps in place, while any answer is written.

    mlx-vlm raises it for an answer and then sets it back to what it was when that answer began:
    of answers that overlap, the last would leave it raised for good.
    """

    def __init__(self) -> None:
        self._lock, self._answers, self._before = Lock(), 0, 0

    @contextmanager
    def raised(self) -> Iterator[None]:
        """From the first of all answers that overlap to the last."""
        if not mx.metal.is_available():
            yield
            return
        with self._lock:
            if not self._answers:
                most = mx.device_info()["max_recommended_working_set_size"]
                self._before = mx.set_wired_limit(int(most))
            self._answers += 1
        try:
            yield
        finally:
            with self._lock:
                self._answers -= 1
                if not self._answers:
                    mx.set_wired_limit(self._before)


WIRED_MEMORY = _WiredMemory()


class RequestTurns:
    """The turns of one request."""

    def __init__(self, host: Host):
        self.host = host
        self._state: dict[str, Any] = {}
        with _locks_lock:
            self._lock = _locks.setdefault(id(host.model), RLock())

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Inside the block no other request of the model computes.

        The model has what this request left on it, and afterwards what it had before. A generator
        must not yield inside: it would keep the lock until it is read again.
        """
        with self._lock, self.host.preserve_state():
            self.host.set_request_state(self._state)
            try:
                yield
            finally:
                self._state = self.host.request_state()

    def each(
        self, pieces: Generator[T, None, None], ends: frozenset[int] = frozenset()
    ) -> Iterator[T]:
        """The pieces, each computed in a turn; mlx-vlm's loop ends an answer at `ends`, too."""
        with WIRED_MEMORY.raised():
            try:
                while True:
                    with self.turn(), self._ending_at(ends):
                        try:
                            piece = next(pieces)
                        except StopIteration:
                            return
                    yield piece
            finally:
                with self.turn():
                    pieces.close()

    @contextmanager
    def _ending_at(self, ends: frozenset[int]) -> Iterator[None]:
        if not ends:
            yield
            return
        processor = self.host.processor
        criteria = getattr(processor, "tokenizer", processor).stopping_criteria
        before = criteria.eos_token_ids
        criteria.eos_token_ids = [*before, *ends]
        try:
            yield
        finally:
            criteria.eos_token_ids = before
