"""The thread that answers: requests wait in a queue, are read one by one, and are written together.

It alone touches the model. A request's pieces go to whoever waits for them by its `deliver`.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from ..checkpoints.errors import UserError
from ..generation.result import GenerationResponse, GenerationResult
from ..generation.running_batch import AnswerPiece, RunningBatch
from ..inputs.budget import FixedBudgetError
from .chat_request import ChatRequest
from .metrics import Metrics
from .refusals import RequestRefusedError, in_api_words
from .time_budget import TimeBudgets
from .visual_budget import VisualBudget

logger = logging.getLogger("mlx_vlm_prune")
FULL = "the server has {} requests waiting, as many as it takes; try again later"

ENDED = "the server answers no more"


@dataclass(frozen=True)
class Piece:
    """A piece of an answer, with the figures of its prompt."""

    response: GenerationResponse
    figures: GenerationResult
    request_ms: float
    queue_ms: float


Event = Piece | RequestRefusedError


@dataclass(eq=False)
class Job:
    """A request on its way; `deliver` gets its pieces, or why there are no more. `request_ms` is
    what its body and its pictures took before."""

    chat: ChatRequest
    deliver: Callable[[Event], None]
    request_ms: float = 0.0
    is_cancelled: bool = False
    start: float = field(default_factory=time.perf_counter)
    queue_ms: float = 0.0


class Engine:
    """The queue and its thread; `most` answers are written together."""

    def __init__(
        self, batch: RunningBatch, most: int, queue: int, metrics: Metrics, times: TimeBudgets
    ) -> None:
        self.batch, self.most, self.queue = batch, most, queue
        self.metrics, self.times = metrics, times
        self.waiting: deque[Job] = deque()
        self.running: dict[int, Job] = {}
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread; what still waits or is being written gets no answer."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    @property
    def is_alive(self) -> bool:
        """Does the thread run?"""
        return self._thread.is_alive()

    def submit(self, job: Job) -> None:
        """Queue a request. Raises RequestRefusedError where the queue is full or has ended."""
        with self._changed:
            if self._stopping or not self.is_alive:
                raise RequestRefusedError(ENDED, 503)
            if len(self.waiting) >= self.queue and len(self.running) >= self.most:
                raise RequestRefusedError(FULL.format(len(self.waiting)), 429)
            self.waiting.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Nobody waits for the answer any more."""
        with self._changed:
            job.is_cancelled = True
            if job in self.waiting:
                self.waiting.remove(job)
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._stopping or self.waiting or self.running):
                    self._changed.wait()
                if self._stopping:
                    break
                job = self._next_job()
            if job:
                self._read(job)
            self._step()
        for job in [*self.waiting, *self.running.values()]:
            job.deliver(RequestRefusedError(ENDED, 503))
        self.batch.close()

    def _next_job(self) -> Job | None:
        """The next request that there is room for; one between two tokens of the others."""
        if len(self.running) >= self.most or not self.waiting:
            return None
        return self.waiting.popleft()

    def _read(self, job: Job) -> None:
        """Read a request's prompt; it ends alone where that is not possible."""
        job.queue_ms = 1000 * (time.perf_counter() - job.start)
        self.running[id(job)] = job
        try:
            try:
                self._add(job, job.chat.budget)
            except FixedBudgetError as problem:
                job.chat.notes.warn(in_api_words(f"{problem}; its own number was kept"))
                self._add(job, VisualBudget(job.chat.budget.pruner))
        except Exception as problem:
            del self.running[id(job)]
            job.deliver(refusal_of(problem))

    def _add(self, job: Job, budget: VisualBudget) -> None:
        """Have the batch read the prompt. Raises UserError, RequestRefusedError."""
        if budget.budget_ms is not None:
            budget = self.times.choose(job.chat)
        request = replace(
            job.chat.request, pruner=budget.pruner, keep_ratio=budget.keep_ratio,
            keep_tokens=budget.keep_tokens,
        )  # fmt: skip
        self.batch.add(id(job), request, low_detail=budget.low_detail)

    def _step(self) -> None:
        """A token of each answer that is still waited for."""
        try:
            for gone in [job for job in self.running.values() if job.is_cancelled]:
                del self.running[id(gone)]
                self.batch.remove(id(gone))
            pieces: Iterable[AnswerPiece] = self.batch.step()
        except Exception as problem:  # whose fault it is cannot be told: all of the batch end
            logger.exception("a step of the batch failed")
            for job in self.running.values():
                job.deliver(refusal_of(problem))
            self.running.clear()
            self.batch.clear()
            return
        for piece in pieces:
            self._deliver(piece)

    def _deliver(self, piece: AnswerPiece) -> None:
        job = self.running[int(str(piece.key))]
        if isinstance(piece.piece, UserError):
            del self.running[id(job)]
            job.deliver(refusal_of(piece.piece))
            return
        assert piece.figures is not None, "a piece comes with the figures of its prompt"
        if piece.piece.generation_tokens == 1:
            self.metrics.count_prompt(piece.figures, job.request_ms, job.queue_ms)
        self.metrics.generated_tokens += 1
        if piece.piece.finish_reason:
            del self.running[id(job)]
        job.deliver(Piece(piece.piece, piece.figures, job.request_ms, job.queue_ms))


def refusal_of(problem: Exception) -> RequestRefusedError:
    """Why a request gets no answer, from whatever was raised."""
    if isinstance(problem, RequestRefusedError):
        return problem
    if isinstance(problem, UserError):
        return RequestRefusedError(in_api_words(str(problem)))
    logger.error("a request failed: %r", problem, exc_info=problem)
    return RequestRefusedError(f"the server failed: {type(problem).__name__}", 500)
