"""Answers that are written together: prompts join and leave between two tokens.

Each prompt is read alone, with its own method and budget. From then on a step of the language model
is a token of every answer.

Shapes: B prompts, V words.
"""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace
from typing import Protocol

import mlx.core as mx
import numpy as np

from ..checkpoints.errors import UserError
from ..inputs.budget import low_detail_tokens
from ..inputs.detokenizer import Detokenizer
from ..inputs.processor import Processor
from ..machine.clock import request_clock
from ..models.joined_prompts import JoinedPrompts
from ..models.vlm import VLM
from .conversation import HeldPrompt
from .prompt_reader import PromptReader
from .request import Request
from .result import GenerationResponse, GenerationResult
from .steps import PromptChooser, check_first_logits
from .stream import AnswerWriter, answer_ends, check_request, prefilled_result


@dataclass(frozen=True)
class AnswerPiece:
    """The next piece of an answer, or the error that ended it; `figures` are of its prompt."""

    key: Hashable
    piece: GenerationResponse | UserError
    figures: GenerationResult | None = None


class RunningBatch(Protocol):
    """Answers that are written together, each known by a key."""

    def __len__(self) -> int: ...

    def check(self, request: Request) -> None:
        """Raises UserError for a method or a budget that the model cannot have."""
        ...

    def add(self, key: Hashable, request: Request, *, low_detail: bool = False) -> None:
        """Read a prompt, whose answer then comes piece by piece; with `low_detail` each image keeps
        `low_detail_tokens`. Raises UserError."""
        ...

    def step(self) -> Iterable[AnswerPiece]:
        """The next piece of each answer. After its last piece an answer is no more known."""
        ...

    def remove(self, key: Hashable) -> None:
        """Write no more of an answer, if it is known."""
        ...

    def clear(self) -> None:
        """Forget all answers, after an error."""
        ...

    def close(self) -> None:
        """Leave the model as it was."""
        ...


@dataclass
class Answer:
    """An answer that is being written."""

    key: Hashable
    choose: PromptChooser
    writer: AnswerWriter
    held: HeldPrompt | None
    tokens_left: int


class OwnRunningBatch:
    """Answers of a model of ours; `most_bytes` is what is held of earlier prompts."""

    def __init__(self, model: VLM, processor: Processor, most_bytes: int = 0) -> None:
        self.model, self.processor = model, processor
        self.reader = PromptReader(model, processor, most_bytes)
        self.clear()

    def __len__(self) -> int:
        return len(self.answers)

    def clear(self) -> None:
        """Forget all answers, after an error."""
        self.answers: list[Answer] = []
        self.prompts = JoinedPrompts()
        self.token_B1: mx.array | None = None  # the next of each, which no layer has read

    def close(self) -> None:
        """Nothing was put on the model."""
        self.clear()
        self.reader.clear()

    def check(self, request: Request) -> None:
        """Raises UserError for a method or a budget that the model cannot have."""
        self.reader.check(request)

    def add(self, key: Hashable, request: Request, *, low_detail: bool = False) -> None:
        """Read a prompt and choose its first token. Raises UserError."""
        check_request(self.processor, request)
        if low_detail:
            request = replace(request, keep_tokens=low_detail_tokens(self.model.N))
        clock = request_clock()
        with self.reader.reading(request, clock) as (read, held):
            choose = PromptChooser(request, read.ids)
            token_11 = clock.end_part("prefill", choose(read.prefill.logits_BV))
            check_first_logits(read.prefill.logits_BV)
        writer = AnswerWriter(
            Detokenizer(self.processor.tokenizer),
            answer_ends(self.processor, request),
            prefilled_result(self.model, request, read, clock),
            request.max_tokens,
        )
        self.prompts.add(read.prefill)
        tokens = [token_11] if self.token_B1 is None else [self.token_B1, token_11]
        self.token_B1 = mx.concatenate([token_B1.astype(mx.int32) for token_B1 in tokens])
        self.answers.append(Answer(key, choose, writer, held, request.max_tokens))

    def step(self) -> list[AnswerPiece]:
        """A token of each answer; while it is turned into text, the next are computed."""
        if not self.answers:
            return []
        assert self.token_B1 is not None, "each prompt has its first token"
        token_B1, faults = self.token_B1, dict[int, UserError]()
        if max(answer.tokens_left for answer in self.answers) > 1:
            self.token_B1 = self._choose(self.prompts.step(token_B1), faults)
            mx.async_eval(self.token_B1)
        pieces, running = [], []
        for b, token in enumerate(np.array(token_B1)[:, 0].tolist()):
            answer = self.answers[b]
            answer.tokens_left -= 1
            piece = answer.writer.add(token)
            if answer.held:
                answer.held.token_ids.append(token)
            pieces.append(AnswerPiece(answer.key, piece, answer.writer.answer))
            if b in faults and not piece.finish_reason:
                pieces.append(AnswerPiece(answer.key, faults[b]))
            elif not piece.finish_reason:
                running.append(b)
            else:
                self._hold(b)
        self._keep(running)
        return pieces

    def remove(self, key: Hashable) -> None:
        """Write no more of an answer; its rows so far are held."""
        others = [b for b, answer in enumerate(self.answers) if answer.key != key]
        for b in set(range(len(self))) - set(others):
            self._hold(b)
        self._keep(others)

    def _choose(self, logits_BV: mx.array, faults: dict[int, UserError]) -> mx.array:
        """The next token of each answer (B, 1); a sampler's error is a fault of its own answer."""
        if all(answer.choose.is_greedy for answer in self.answers):
            return mx.argmax(logits_BV, axis=-1, keepdims=True).astype(mx.int32)
        tokens = []
        for b, answer in enumerate(self.answers):
            try:
                tokens.append(answer.choose(logits_BV[b : b + 1]).astype(mx.int32))
            except UserError as fault:
                faults[b] = fault
                tokens.append(mx.zeros((1, 1), mx.int32))
        return mx.concatenate(tokens)

    def _hold(self, b: int) -> None:
        """Hold the rows of an answer's prompt, and of as much of the answer as was read."""
        if (held := self.answers[b].held) and self.reader.rows.most_bytes:
            held.cache = self.prompts.rows_of([b])
            mx.eval([(layer.keys_BGSd, layer.values_BGSd) for layer in held.cache])
            self.reader.keep(held)

    def _keep(self, prompts: list[int]) -> None:
        """Go on with these answers alone."""
        if len(prompts) == len(self):
            return
        self.answers = [self.answers[b] for b in prompts]
        self.prompts.keep(prompts)
        assert self.token_B1 is not None
        self.token_B1 = self.token_B1[mx.array(prompts)] if prompts else None
