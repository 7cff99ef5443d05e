"""Answers that are written together: prompts join and leave between two tokens.

Each prompt is read alone, with its own method and budget. From then on a step of the language model
is a token of every answer.

Shapes: B prompts, V words.
"""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from ..checkpoints.errors import UserError
from ..inputs.budget import FixedBudgetError, budget, low_detail_tokens
from ..inputs.detokenizer import Detokenizer
from ..inputs.processor import Processor
from ..inputs.prompt import Prompt
from ..machine.clock import Clock, request_clock
from ..models.joined_prompts import JoinedPrompts
from ..models.vlm import VLM
from .conversation import HeldPrompt, Picture
from .prompt_reader import PromptReader
from .request import Request
from .result import GenerationResponse, GenerationResult
from .steps import PromptChooser, check_first_logits
from .stream import (
    NO_CLIPS,
    AnswerWriter,
    answer_ends,
    check_request,
    pipeline_for,
    prefilled_result,
)

CLEAR_EVERY = 256  # steps, after which memory that nothing uses goes back to the machine


@dataclass(frozen=True)
class PreparedRequest:
    """A request whose words are ids and whose pictures are pixels.

    `rows` are those of the prompt with all visual tokens, as far as they are known. The clock has
    timed this; it goes on when the prompt is read.
    """

    request: Request
    clock: Clock
    rows: int

    @property
    def image_ms(self) -> float:
        """Milliseconds that it took."""
        return self.clock.ms["image"]


@dataclass(frozen=True)
class AnswerRoom:
    """The rows that a prompt takes, and how many tokens its answer may have: as many as were asked
    for, or fewer where the model's context ends before."""

    rows: int
    max_tokens: int


@dataclass(frozen=True)
class AnswerPiece:
    """What comes next of an answer, or the error that ended it; `figures` are of its prompt."""

    key: Hashable
    response: GenerationResponse | Exception
    figures: GenerationResult | None = None


class RunningBatch(Protocol):
    """Answers that are written together, each known by a key."""

    def __len__(self) -> int: ...

    def check(self, request: Request) -> None:
        """Raises UserError for a method or a budget that the model cannot have."""
        ...

    def prepare(self, request: Request) -> PreparedRequest:
        """Turn words into ids and pictures into pixels, without the model: in any thread, one
        request at a time. Raises UserError."""
        ...

    def add(self, key: Hashable, prepared: Any, *, low_detail: bool = False) -> AnswerRoom | None:
        """Read a prompt of `prepare`, whose answer then comes piece by piece; with `low_detail`
        each image keeps `low_detail_tokens`. None where it is read later. Raises UserError."""
        ...

    def step(self) -> Iterable[AnswerPiece]:
        """The next piece of each answer, all of which are to be taken. After its last piece an
        answer is no more known."""
        ...

    def remove(self, key: Hashable) -> None:
        """Write no more of an answer, if it is known."""
        ...

    def clear(self) -> None:
        """Forget all answers, after an error."""
        ...

    def close(self) -> None:
        """Forget all answers and all that is held of prompts, and leave the model as it was."""
        ...


class ServedBatch(RunningBatch, Protocol):
    """A batch that a server can bound: `context` counts the rows that the model reads,
    `longest_token` the characters of the longest token of its vocabulary. `why_no_clips` says why
    it answers about no video, if so."""

    context: int
    longest_token: int
    why_no_clips: str | None

    def rows_left(self, prepared: Any, *, low_detail: bool = False) -> int:
        """The rows that a prompt of `prepare` takes at most when it is pruned; all where that is
        known only when it is read. Raises UserError."""
        ...

    def add(self, key: Hashable, prepared: Any, *, low_detail: bool = False) -> AnswerRoom:
        """Read a prompt of `prepare` at once. Raises UserError."""
        ...


def check_characters(batch: ServedBatch, request: Request) -> None:
    """Raises UserError for texts that are longer than the longest prompt, so that none of them is
    tokenized."""
    turns = [text for turn in request.history for text in (turn.question, turn.answer)]
    characters = sum(map(len, (request.prompt, request.system or "", *turns)))
    if characters > batch.context * batch.longest_token:
        raise UserError(
            f"the texts have {characters} characters; the model reads up to {batch.context} tokens"
            f" of up to {batch.longest_token} characters each"
        )


def answer_room(request: Request, rows: int, context: int) -> AnswerRoom:
    """The room behind a prompt; the last token of an answer is no row any more."""
    return AnswerRoom(rows, min(request.max_tokens, max(1, context + 1 - rows)))


@dataclass(frozen=True)
class PreparedTurns(PreparedRequest):
    """A request to a model of ours: its pictures, and all turns as ids."""

    pictures: list[Picture]
    prompt: Prompt


@dataclass
class JoinedAnswer:
    """An answer of a model of ours that is being written."""

    key: Hashable
    choose: PromptChooser
    writer: AnswerWriter
    held: HeldPrompt | None
    tokens_left: int


class OwnRunningBatch:
    """Answers of a model of ours; `most_bytes` is what is held of earlier prompts."""

    why_no_clips: str | None = NO_CLIPS

    def __init__(self, model: VLM, processor: Processor, most_bytes: int = 0) -> None:
        self.model, self.processor = model, processor
        self.reader = PromptReader(model, processor, most_bytes)
        self.context = model.config.text.max_position_embeddings
        self.longest_token = max(map(len, processor.tokenizer.backend.get_vocab()))
        self.clear()

    def __len__(self) -> int:
        return len(self.answers)

    def clear(self) -> None:
        """Forget all answers, after an error."""
        self.answers: list[JoinedAnswer] = []
        self.prompts = JoinedPrompts()
        self.token_B1: mx.array | None = None  # the next of each, which no layer has read
        self.steps = 0
        mx.clear_cache()

    def close(self) -> None:
        """Forget all answers and all that is held of prompts."""
        self.reader.clear()
        self.clear()

    def check(self, request: Request) -> None:
        """Raises UserError for a method or a budget that the model cannot have."""
        self.reader.check(request)

    def prepare(self, request: Request) -> PreparedTurns:
        """Open the pictures and tokenize all turns. Raises UserError."""
        check_request(self.processor, request)
        clock = request_clock()
        pictures, prompt = self.reader.open(request, clock)
        return PreparedTurns(request, clock, len(prompt.ids), pictures, prompt)

    def rows_left(self, prepared: PreparedTurns, *, low_detail: bool = False) -> int:
        """The rows of a pruned prompt that the first layer reads. Raises UserError."""
        request, N = prepared.request, self.model.N
        pipeline = pipeline_for(self.model, request.pruner)
        if pipeline.has_dynamic_budget:
            return prepared.rows
        tokens = low_detail_tokens(N) if low_detail else request.keep_tokens
        try:
            K = budget(N, request.keep_ratio, tokens, pipeline)
        except FixedBudgetError:  # its own number is kept
            K = budget(N, None, None, pipeline)
        return prepared.rows - len(prepared.pictures) * (N - pipeline.budgets(N, K).before_layers)

    def add(
        self, key: Hashable, prepared: PreparedTurns, *, low_detail: bool = False
    ) -> AnswerRoom:
        """Read a prompt and choose its first token. Raises UserError."""
        request, clock, reader = prepared.request, prepared.clock, self.reader
        clock.resume()
        if low_detail:
            request = replace(request, keep_tokens=low_detail_tokens(self.model.N))
        with reader.naming_faulty_part(prepared.pictures, prepared.prompt):
            read = reader.read(request, prepared.pictures, prepared.prompt, clock)
            choose = PromptChooser(request, read.ids)
            token_11 = clock.end_part("prefill", choose(read.prefill.logits_BV))
            check_first_logits(read.prefill.logits_BV)
        next_position = int(np.array(read.prefill.next_B1)[0, 0])
        room = answer_room(request, next_position, self.context)  # positions may be more than rows
        room = replace(room, rows=max(read.prefill.rows))
        writer = AnswerWriter(
            Detokenizer(self.processor.tokenizer),
            answer_ends(self.processor, request),
            prefilled_result(self.model, request, read, clock),
            room.max_tokens,
        )
        self.prompts.add(read.prefill)
        if held := reader.take_rows():
            held.cache = []  # the batch has them now, and gives them back when the answer ends
        tokens = [token_11] if self.token_B1 is None else [self.token_B1, token_11]
        self.token_B1 = mx.concatenate([token_B1.astype(mx.int32) for token_B1 in tokens])
        self.answers.append(JoinedAnswer(key, choose, writer, held, room.max_tokens))
        return room

    def step(self) -> list[AnswerPiece]:
        """A token of each answer; while it is turned into text, the next are computed."""
        if not self.answers:
            return []
        assert self.token_B1 is not None, "each prompt has its first token"
        token_B1, faults = self.token_B1, dict[int, Exception]()
        if max(answer.tokens_left for answer in self.answers) > 1:
            self.token_B1 = self._choose(self.prompts.step(token_B1), faults)
            mx.async_eval(self.token_B1)
        pieces, running = list[AnswerPiece](), list[int]()
        for b, token in enumerate(np.array(token_B1)[:, 0].tolist()):
            answer = self.answers[b]
            pieces += _written(answer, token, faults.get(b))
            last = pieces[-1].response
            if not isinstance(last, Exception) and last.finish_reason:
                self._hold(b)
            elif not isinstance(last, Exception):
                running.append(b)
        self._keep(running)
        self.steps += 1
        if self.steps % CLEAR_EVERY == 0:
            mx.clear_cache()
        return pieces

    def remove(self, key: Hashable) -> None:
        """Write no more of an answer; its rows so far are held."""
        others = [b for b, answer in enumerate(self.answers) if answer.key != key]
        for b in set(range(len(self))) - set(others):
            self._hold(b)
        self._keep(others)

    def _choose(self, logits_BV: mx.array, faults: dict[int, Exception]) -> mx.array:
        """The next token of each answer (B, 1); a sampler's error is a fault of its own answer."""
        if all(answer.choose.is_greedy for answer in self.answers):
            return mx.argmax(logits_BV, axis=-1, keepdims=True).astype(mx.int32)
        tokens = []
        for b, answer in enumerate(self.answers):
            try:
                tokens.append(answer.choose(logits_BV[b : b + 1]).astype(mx.int32))
            except Exception as fault:
                faults[b] = fault
                tokens.append(mx.zeros((1, 1), mx.int32))
        return mx.concatenate(tokens)

    def _hold(self, b: int) -> None:
        """Hold the rows of an answer's prompt, and of as much of the answer as was read; more than
        can be held are not even copied."""
        if held := self.answers[b].held:
            rows = len(held.keys) + len(held.token_ids)
            if rows * self.prompts.row_bytes <= self.reader.rows.most_bytes:
                held.cache = self.prompts.rows_of([b])
                self.reader.keep(held)

    def _keep(self, prompts: list[int]) -> None:
        """Go on with these answers alone."""
        if len(prompts) == len(self):
            return
        self.answers = [self.answers[b] for b in prompts]
        self.prompts.keep(prompts)
        assert self.token_B1 is not None
        self.token_B1 = self.token_B1[mx.array(prompts)] if prompts else None
        if not prompts:
            mx.clear_cache()


def _written(answer: JoinedAnswer, token: int, fault: Exception | None) -> list[AnswerPiece]:
    """The piece of a token, and behind it the fault that ends the answer, if there is one."""
    answer.tokens_left -= 1
    try:
        response = answer.writer.add(token)
    except Exception as problem:  # in turning its tokens into text: the other answers go on
        return [AnswerPiece(answer.key, problem)]
    if answer.held:
        answer.held.token_ids.append(token)
    pieces = [AnswerPiece(answer.key, response, answer.writer.answer)]
    if fault and not response.finish_reason:
        pieces.append(AnswerPiece(answer.key, fault))
    return pieces
