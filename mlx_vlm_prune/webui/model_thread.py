"""The one thread that computes for all pages, and the models that conversations use."""

import os
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakValueDictionary

from ..checkpoints.errors import UserError
from ..checkpoints.reading.paths import expand_home
from ..evaluation.sweep_cases import swept_model
from ..machine.threads import computing
from ..models.vlm import VLM
from ..pruners import METHODS, PRESETS
from ..pruners.contract import Stage

if TYPE_CHECKING:
    from ..chat import Chat

T = TypeVar("T")


class ModelThread:
    """MLX computes in one thread. Answers of several conversations take turns in it, a piece each,
    and calls are carried out in their order."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "model")

    def run(self, call: Callable[..., T], *arguments: Any) -> T:
        """The result of a call. Raises what it raises."""
        return self.start(call, *arguments).result()

    def start(self, call: Callable[..., T], *arguments: Any) -> "Future[T]":
        """Have a call carried out, without waiting for it."""
        return self._pool.submit(call, *arguments)

    def close(self) -> None:
        """End, once what was begun is done."""
        self._pool.submit(computing(lambda: None))  # behind all that the thread has computed
        self._pool.shutdown()

    def pieces(self, stream: Generator[T, None, None]) -> Iterator[T]:
        """The pieces of a stream, each computed when it is read. Raises what the stream raises."""
        try:
            while (piece := self.run(next, stream, None)) is not None:
                yield piece
        finally:
            self.start(stream.close)


@dataclass(frozen=True, eq=False)
class OpenModel:
    """A model that conversations use, and its name in the menu. `new_chat` begins a `Chat` with it,
    with options of the chat."""

    name: str
    model: Any
    processor: Any
    new_chat: "Callable[..., Chat]"

    @cached_property
    def methods(self) -> list[str]:
        """The methods and presets that the model can prune by; `none` first."""
        swept, names = swept_model(self.model, self.processor), []
        for name in (*METHODS, *PRESETS):
            if name in METHODS and METHODS[name].stage is Stage.ENHANCER:
                continue
            try:
                swept.plan(name)
            except UserError:
                continue
            names.append(name)
        return names

    def __str__(self) -> str:
        tokens = f", {self.model.N} visual tokens an image" if isinstance(self.model, VLM) else ""
        return f"{self.name}{tokens}"


class Models:
    """Models by name. The one that was opened last is held, every other as long as a conversation
    uses it. `first` is the name of the command line's.

    `read` opens a model by its name, in the thread that computes.
    """

    def __init__(
        self, thread: ModelThread, first: OpenModel, read: Callable[[str], OpenModel]
    ) -> None:
        self.thread, self.first, self.read = thread, first.name, read
        self._lock, self._latest = Lock(), first
        self._open: WeakValueDictionary[str, OpenModel] = WeakValueDictionary()
        self._open[place_of(first.name)] = first

    def open(self, name: str) -> OpenModel:
        """The model in a folder, however its path is written; the built-in one and the first one by
        their names. Raises UserError."""
        name = name.strip()
        place, is_first = place_of(name), place_of(name) == place_of(self.first)
        with self._lock:
            opened = self._open.get(place)
            if opened is None:
                opened = self.thread.run(self.read, self.first if is_first else name)
            self._open[place] = self._latest = opened
            return opened


def place_of(name: str) -> str:
    """The folder that a name leads to, or else the name. Raises UserError for `~` of nobody."""
    folder = expand_home(name)
    return os.path.realpath(folder) if name and os.path.isdir(folder) else name
