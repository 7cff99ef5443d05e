"""A store with a bound in bytes and in values; the least recently used are dropped first."""

import sys
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

Value = TypeVar("Value")


class BoundedStore(Generic[Value]):
    """Values by key. A value that is larger than the whole store is not kept."""

    def __init__(self, most_bytes: int = sys.maxsize, most_values: int = sys.maxsize) -> None:
        self.most_bytes, self.most_values, self.nbytes = most_bytes, most_values, 0
        self._values: OrderedDict[Hashable, tuple[Value, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[tuple[Hashable, Value]]:
        """Keys and values, the least recently used first."""
        return ((key, value) for key, (value, _) in self._values.items())

    def get(self, key: Hashable) -> Value | None:
        """The value, which is then the most recently used."""
        if key not in self._values:
            return None
        self._values.move_to_end(key)
        return self._values[key][0]

    def put(self, key: Hashable, value: Value, nbytes: int) -> None:
        """Keep a value of so many bytes, in place of what the key had."""
        self.drop(key)
        if nbytes > self.most_bytes:
            return
        self._values[key] = value, nbytes
        self.nbytes += nbytes
        while self.nbytes > self.most_bytes or len(self) > self.most_values:
            self.drop(next(iter(self._values)))

    def drop(self, key: Hashable) -> None:
        """Forget a value, if there is one."""
        if key in self._values:
            self.nbytes -= self._values.pop(key)[1]

    def clear(self) -> None:
        """Forget all."""
        self._values.clear()
        self.nbytes = 0
