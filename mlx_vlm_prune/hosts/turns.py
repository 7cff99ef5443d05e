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

from .host import Host

_locks: WeakValueDictionary[int, Any] = WeakValueDictionary()  # by the id of a model that is used
_locks_lock = Lock()
T = TypeVar("T")


class RequestTurns:
    """The turns of one request."""

    def __init__(self, host: Host):
        self.host = host
        self._state: dict[str, Any] = {}
        with _locks_lock:
            self._lock = _locks.setdefault(id(host.model), RLock())

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Inside the block no other request of the model computes, and the model has what this one
        left on it. Afterwards it is as before. Never yield from a generator inside."""
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
