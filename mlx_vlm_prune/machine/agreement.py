"""What processes that share a work must do together, whichever framework connects them."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from ..checkpoints.errors import UserError


class LocalFault(UserError):
    """A mistake that only some processes have met; the others cannot say it."""


class Agreement:
    """A group of `size` processes, of which this is the one of `rank`."""

    rank: int
    size: int

    @property
    def is_first(self) -> bool:
        """It alone writes and prints."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Of each value over all processes, the same in all."""
        raise NotImplementedError

    def share(self, numbers: np.ndarray) -> np.ndarray:
        """This process's part of some numbers."""
        return numbers[self.rank :: self.size]

    def union(self, numbers: Iterable[int], below: int) -> set[int]:
        """Of all processes' sets of numbers below a bound."""
        if self.size == 1:
            return set(numbers)
        is_in = np.zeros(below)
        is_in[list(numbers)] = 1
        return set(np.flatnonzero(self.sum(is_in.tolist())).tolist())

    def agree(self, fault: UserError | None) -> None:
        """Raise what this process has met, or end silently where another has met something."""
        faults = self.sum([float(fault is not None)])[0]
        if fault is not None:
            raise fault if faults == self.size else LocalFault(str(fault)) from None
        if faults:
            sys.exit(2)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Where the block ends in a UserError in one process, it ends all of them."""
        fault = None
        try:
            yield
        except LocalFault:  # which all have agreed on
            raise
        except UserError as e:
            fault = e
        self.agree(fault)

    @contextmanager
    def mistakes_once(self) -> Iterator[None]:
        """Inside the block a mistake that all have met is raised by the first alone."""
        try:
            yield
        except LocalFault:
            raise
        except UserError:
            if not self.is_first:
                sys.exit(2)
            raise
