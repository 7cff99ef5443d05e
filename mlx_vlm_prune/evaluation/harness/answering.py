"""Answers to a task's questions, several at once, each the one that it gets alone."""

from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ...checkpoints.errors import UserError
from ...generation.request import Request
from ...generation.result import GenerationResponse, GenerationResult
from ...generation.running_batch import (
    AnswerPiece,
    OwnRunningBatch,
    PreparedRequest,
    RunningBatch,
)
from ...generation.stop_strings import StopStrings
from ...hosts.compatibility import check_pipeline
from ...hosts.conversation import HostConversation
from ...hosts.families import host_of
from ...hosts.families.pruner_defaults import plan_for_host
from ...hosts.running_batch import HostRunningBatch
from ...hosts.views import View
from ...machine.bounded_store import BoundedStore
from ...machine.clock import request_clock
from ...models.vlm import VLM
from ...pruners import Pruner
from .options import RunOptions


@dataclass(frozen=True)
class TaskQuestion:
    """A question by its name in sentences. Its request is made, and its pictures are opened, when
    its turn comes; an answer ends before a text of `until`."""

    name: str
    make_request: Callable[[], Request]
    until: Sequence[str] = ()


@dataclass(frozen=True)
class TaskAnswer:
    """The text up to where it ends, and the figures of its prompt, where they are known."""

    text: str
    generation_tokens: int
    prompt_tokens: int
    figures: GenerationResult | None


@dataclass
class OpenAnswer:
    """An answer that is being written."""

    ends: StopStrings
    texts: list[str] = field(default_factory=list)
    figures: GenerationResult | None = None

    def add(self, piece: GenerationResponse) -> bool:
        """Is the answer complete with this piece?"""
        is_last = piece.finish_reason is not None
        self.texts.append(self.ends.add(piece.text, is_last))
        return is_last or self.ends.is_found


class HostAnswers:
    """A running batch of one answer, by mlx-vlm's own loop: methods between the language model's
    layers work there, too. `most_bytes` is what is held of the tower's output for earlier images.
    """

    def __init__(self, model: Any, processor: Any, most_bytes: int) -> None:
        store = BoundedStore[list[View]](most_bytes)
        self.conversation = HostConversation(model, processor, store)
        self.key: Hashable = None
        self.pieces: Generator[GenerationResponse, None, None] | None = None

    def __len__(self) -> int:
        return int(self.pieces is not None)

    def clear(self) -> None:
        """Forget the answer, after an error."""
        if self.pieces is not None:
            self.pieces.close()
        self.key, self.pieces = None, None

    def close(self) -> None:
        """Nothing was put on the model."""
        self.clear()
        self.conversation.clear()

    def check(self, request: Request) -> None:
        """Raises UserError for a method or a budget that the model cannot have."""
        self.conversation.check(request)

    def prepare(self, request: Request) -> PreparedRequest:
        """The request as it is: mlx-vlm's loop prepares it."""
        return PreparedRequest(request, request_clock(), 0)

    def add(self, key: Hashable, prepared: PreparedRequest, *, low_detail: bool = False) -> None:
        """Have a prompt read by the first step. Raises UserError."""
        assert self.pieces is None and not low_detail
        self.key, self.pieces = key, self.conversation.stream(prepared.request)

    def step(self) -> list[AnswerPiece]:
        """The next piece. Raises UserError where the prompt cannot be answered."""
        assert self.pieces is not None, "a prompt was added"
        piece = next(self.pieces)
        event = AnswerPiece(self.key, piece, piece.result)
        if piece.finish_reason:
            self.clear()
        return [event]

    def remove(self, key: Hashable) -> None:
        """Write no more of an answer, if it is known."""
        if self.pieces is not None and key == self.key:
            self.clear()


@contextmanager
def running_batch(model: Any, processor: Any, options: RunOptions) -> Iterator[RunningBatch]:
    """What writes answers together, checked for the run's method and budget. While the block lasts
    a model of mlx-vlm's prunes nowhere else. Raises UserError."""
    batch: RunningBatch
    most_bytes = int(options.cache_gb * 1e9)
    if isinstance(model, VLM):
        batch = OwnRunningBatch(model, processor, most_bytes)
    elif decoder := _decoder_method(model, options):
        if options.batch_size > 1:
            raise UserError(
                f"{decoder.name} works between the language model's layers, where batches of"
                " mlx-vlm's do not reach; give batch_size 1"
            )
        batch = HostAnswers(model, processor, most_bytes)
    else:
        batch = HostRunningBatch(model, processor, options.batch_size, most_bytes)
    try:
        batch.check(Request("", [], **options.request))
        yield batch
    finally:
        batch.close()


def _decoder_method(model: Any, options: RunOptions) -> Pruner | None:
    """The method between the layers of a model of mlx-vlm's, if it works there. Raises UserError
    where it does not."""
    host = host_of(model)
    pipeline = plan_for_host(host, options.pruner)
    check_pipeline(host, pipeline, options.positions)
    return pipeline.decoder


def answer_questions(
    batch: RunningBatch, questions: Sequence[TaskQuestion], at_once: int
) -> Iterator[tuple[int, TaskAnswer]]:
    """The answers as they are complete, each with its question's number from 0.

    Raises UserError, which names the question: there is never an answer in place of an error.
    """
    waiting, running = iter(range(len(questions))), dict[int, OpenAnswer]()
    while True:
        while len(running) < at_once and (number := next(waiting, None)) is not None:
            running[number] = OpenAnswer(StopStrings(questions[number].until))
            with naming_question(questions[number].name):
                batch.add(number, batch.prepare(questions[number].make_request()))
        if not running:
            return
        for event in _step(batch, questions, running):
            number, piece = event.key, event.response
            if number not in running:  # it ended at a text of its question's
                continue
            with naming_question(questions[number].name):
                if isinstance(piece, Exception):
                    raise piece
            answer = running[number]
            answer.figures = event.figures or answer.figures
            if answer.add(piece):
                batch.remove(number)
                del running[number]
                text, tokens = "".join(answer.texts), piece.generation_tokens
                yield number, TaskAnswer(text, tokens, piece.prompt_tokens, answer.figures)


def _step(
    batch: RunningBatch, questions: Sequence[TaskQuestion], running: dict[int, OpenAnswer]
) -> list[Any]:
    """The next pieces; an error of a batch of one is that question's."""
    if len(running) > 1:
        return [*batch.step()]
    (number,) = running
    with naming_question(questions[number].name):
        return [*batch.step()]


@contextmanager
def naming_question(name: str) -> Iterator[None]:
    """A UserError inside says which question is at fault."""
    try:
        yield
    except UserError as problem:
        raise UserError(f"{name}: {problem}") from problem
