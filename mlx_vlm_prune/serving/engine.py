"""The queue of requests, and the two threads that prepare and answer them.

One turns the next ones' words into ids and their pictures into pixels. The other reads their
prompts one by one and writes the answers; it alone touches the model. A request's pieces go to
whoever waits for them by its `deliver`. Whatever ends a thread, everybody who waits gets to know
that no piece comes any more.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from ..checkpoints.errors import UserError
from ..generation.result import GenerationResponse, GenerationResult
from ..generation.running_batch import (
    AnswerPiece,
    AnswerRoom,
    PreparedRequest,
    ServedBatch,
    check_characters,
)
from ..inputs.budget import FixedBudgetError
from ..machine.threads import computing
from .auto_methods import AutoMethods
from .chat_request import ChatRequest
from .memory import AnswerMemory
from .metrics import Metrics
from .refusals import RequestRefusedError, in_api_words
from .time_budget import TimeBudgets
from .visual_budget import VisualBudget

logger = logging.getLogger("mlx_vlm_prune")
ENDED = "the server answers no more"
PREPARED_AHEAD = 2  # requests, whose pixels take memory


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
    what its body and its pictures took before, `rows` what prompt and answer may take."""

    chat: ChatRequest
    deliver: Callable[[Event], None]
    request_ms: float = 0.0
    is_cancelled: bool = False
    start: float = field(default_factory=time.perf_counter)
    queue_ms: float = 0.0
    prepared: PreparedRequest | None = None
    rows: int = 0
    auto: str | None = None  # why its method, where that was chosen


class Engine:
    """The queue, which whoever submits requests bounds, and its threads; `most_answers` are written
    together, as far as `memory` holds them."""

    def __init__(
        self, batch: ServedBatch, most_answers: int, metrics: Metrics, times: TimeBudgets,
        memory: AnswerMemory, auto: AutoMethods | None = None,
    ) -> None:  # fmt: skip
        self.batch, self.most_answers = batch, most_answers
        self.metrics, self.times, self.memory, self.auto = metrics, times, memory, auto
        self.waiting: deque[Job] = deque()
        self.running: set[Job] = set()
        self._changed = threading.Condition()
        self._stopping = False
        self._threads = [
            threading.Thread(target=computing(run), name=name, daemon=True)
            for name, run in (("engine", self._run_engine), ("preparer", self._run_preparer))
        ]

    def start(self) -> None:
        """Begin to answer."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End the threads; what still waits or is being written gets no answer."""
        self._end()
        for thread in self._threads:
            thread.join()

    @property
    def is_alive(self) -> bool:
        """Do the threads run?"""
        return all(thread.is_alive() for thread in self._threads)

    def submit(self, job: Job) -> None:
        """Queue a request. Raises RequestRefusedError where the queue has ended, and for texts that
        no prompt could have."""
        try:
            check_characters(self.batch, job.chat.request)
        except UserError as problem:
            raise refusal_of(problem) from None
        with self._changed:
            if self._stopping or not self.is_alive:
                raise RequestRefusedError(ENDED, 503)
            self.waiting.append(job)
            self._changed.notify_all()

    def cancel(self, job: Job) -> None:
        """Nobody waits for the answer any more."""
        with self._changed:
            job.is_cancelled = True
            if job in self.waiting:
                self.waiting.remove(job)
            self._changed.notify_all()

    def _end(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def _run_preparer(self) -> None:
        try:
            while job := self._next_unprepared():
                self._prepare(job)
        except Exception:
            logger.exception("the thread that prepares requests ended")
        finally:
            self._end()

    def _next_unprepared(self) -> Job | None:
        """Waits for a request to prepare; None at the end."""
        with self._changed:
            while not self._stopping:
                ahead = [*self.waiting][:PREPARED_AHEAD]
                if job := next((job for job in ahead if not job.prepared), None):
                    return job
                self._changed.wait()
            return None

    def _prepare(self, job: Job) -> None:
        """Words to ids and pictures to pixels; a request ends alone where that is not possible."""
        request = job.chat.request
        try:
            if self.auto:
                budget, job.auto = self.auto.of_request(job.chat)
                job.chat = replace(job.chat, budget=budget)
            prepared = self.batch.prepare(request)
            rows = self._rows(prepared, job.chat.budget)
            job.rows = min(rows + request.max_tokens, max(rows, self.batch.context))
            self.memory.check(rows, job.rows - rows)
        except Exception as problem:
            self.cancel(job)
            job.deliver(refusal_of(problem))
            return
        with self._changed:
            job.prepared = prepared
            self._changed.notify_all()

    def _rows(self, prepared: PreparedRequest, budget: VisualBudget) -> int:
        """The rows of a prompt, pruned by a budget that says how far before the prompt is read."""
        if budget.budget_ms is not None:
            return prepared.rows
        return self.batch.rows_left(_pruned(prepared, budget), low_detail=budget.low_detail)

    def _run_engine(self) -> None:
        try:
            while self._wait_for_work():
                self._take_turn()
        except Exception:
            logger.exception("the thread that answers ended")
        finally:
            self._end()
            with self._changed:
                left = [*self.waiting, *self.running]
            for job in left:
                job.deliver(RequestRefusedError(ENDED, 503))
            self.batch.close()

    def _wait_for_work(self) -> bool:
        """Waits until there is an answer to write or a prompt to read; False at the end."""
        with self._changed:
            while not (self._stopping or self.running or self._is_next_ready):
                self._changed.wait()
            return not self._stopping

    @property
    def _is_next_ready(self) -> bool:
        return bool(self.waiting and self.waiting[0].prepared)

    def _take_turn(self) -> None:
        """A prompt, if there is room for one, and a token of each answer."""
        for gone in [job for job in self.running if job.is_cancelled]:
            self.running.remove(gone)
            self.batch.remove(gone)
        job = self._next_job()
        if job and not job.is_cancelled:
            self._read(job)
        self._step()

    def _next_job(self) -> Job | None:
        """The next request that there is room for, in the order of the queue."""
        with self._changed:
            if not self._is_next_ready or len(self.running) >= self.most_answers:
                return None
            rows = [job.rows for job in (*self.running, self.waiting[0])]
            if self.running and not self.memory.holds(rows):
                return None
            self._changed.notify_all()  # one more can be prepared
            return self.waiting.popleft()

    def _read(self, job: Job) -> None:
        """Read a request's prompt; it ends alone where that is not possible."""
        assert job.prepared is not None, "it was ready"
        waited_ms = 1000 * (time.perf_counter() - job.start)
        job.queue_ms = max(0.0, waited_ms - job.prepared.image_ms)
        self.running.add(job)
        try:
            try:
                room = self._add(job, job.chat.budget)
            except FixedBudgetError as problem:
                job.chat.notes.warn(in_api_words(f"{problem}; its own number was kept"))
                room = self._add(job, VisualBudget(job.chat.budget.pruner))
            self._check_room(job, room)
        except Exception as problem:
            self.running.remove(job)
            self.batch.remove(job)
            job.deliver(refusal_of(problem))
        job.prepared = None  # its pixels

    def _add(self, job: Job, budget: VisualBudget) -> AnswerRoom:
        """Have the batch read the prompt. Raises UserError, RequestRefusedError."""
        assert job.prepared is not None, "it was ready"
        if budget.budget_ms is not None:
            budget = self.times.choose(job.chat, job.prepared)
            if budget.pruner == "none":  # no number met it, or all of them do
                job.auto = None
        prepared = _pruned(job.prepared, budget)
        return self.batch.add(job, prepared, low_detail=budget.low_detail)

    def _check_room(self, job: Job, room: AnswerRoom) -> None:
        """A warning where the model's context ends before the answer may. Raises
        RequestRefusedError for a strict request."""
        job.rows = room.rows + room.max_tokens
        wanted = job.chat.request.max_tokens
        if job.chat.gives_max_tokens and room.max_tokens < wanted:
            job.chat.notes.warn(
                f"max_tokens is {wanted}; behind this prompt the model's context has room for"
                f" {room.max_tokens}",
                "max_tokens",
            )

    def _step(self) -> None:
        """A token of each answer, which is sent before the batch gets ready for the next."""
        try:
            for piece in self.batch.step():
                self._deliver(piece)
        except Exception as problem:  # whose fault it is cannot be told: all of the batch end
            logger.exception("a step of the batch failed")
            for job in self.running:
                job.deliver(refusal_of(problem))
            self.running.clear()
            self.batch.clear()

    def _deliver(self, piece: AnswerPiece) -> None:
        job, response = piece.key, piece.response
        assert isinstance(job, Job), "each answer was added by its job"
        if isinstance(response, Exception):
            self.running.remove(job)
            job.deliver(refusal_of(response))
            return
        assert piece.figures is not None, "a piece comes with the figures of its prompt"
        if response.generation_tokens == 1:
            self.metrics.count_prompt(piece.figures, job.request_ms, job.queue_ms)
        self.metrics.generated_tokens += 1
        if response.finish_reason:
            self.running.remove(job)
        figures = replace(piece.figures, auto=job.auto) if job.auto else piece.figures
        job.deliver(Piece(response, figures, job.request_ms, job.queue_ms))


def _pruned(prepared: PreparedRequest, budget: VisualBudget) -> PreparedRequest:
    """A request with the method and the numbers of a budget."""
    request = replace(
        prepared.request, pruner=budget.pruner, keep_ratio=budget.keep_ratio,
        keep_tokens=budget.keep_tokens,
    )  # fmt: skip
    return replace(prepared, request=request)


def refusal_of(problem: Exception) -> RequestRefusedError:
    """Why a request gets no answer, from whatever was raised."""
    if isinstance(problem, RequestRefusedError):
        return problem
    if isinstance(problem, UserError):
        return RequestRefusedError(in_api_words(str(problem)))
    logger.error("a request failed: %r", problem, exc_info=problem)
    return RequestRefusedError(f"the server failed: {type(problem).__name__}", 500)
