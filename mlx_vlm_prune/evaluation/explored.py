"""Full and pruned answers about the same images, with what `explore` shows of each.

Of every answer: the tokens' log-probabilities with all visual tokens and with the kept ones, what
the prompt's words attended to where a method reads it, and the predicted time.

Shapes: N visual tokens of a view, T words of the prompt.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from ..generation.exploration import ExploredAnswer, WordAttention
from ..generation.prefill import Prefill
from ..generation.request import Request
from ..generation.result import GenerationResult
from ..generation.steps import token_logprobs
from ..generation.stream import pipeline_for, prepare_request
from ..hosts import prompt as host_prompt
from ..hosts.compatibility import check_pipeline
from ..hosts.families import host_of
from ..hosts.families.pruner_defaults import plan_for_host
from ..hosts.host import generation_stream
from ..hosts.prefill import HostPrefill, prefill_through_cuts
from ..inputs.budget import budget
from ..inputs.image import open_image
from ..inputs.processor import Processor
from ..models.splice import outside
from ..models.vlm import VLM
from ..pruners import Pipeline
from ..pruners.observed import WordChoice, observing_words
from ..pruners.trace import Trace
from .budgeted_methods import BudgetedMethod
from .predicted_times import (
    Answer,
    CalibratedTimes,
    CountedTimes,
    PredictedTimes,
    predict_or_warn,
)


@dataclass(frozen=True)
class ReadPrompt:
    """A prompt that was read, and the ids of its words: all, and those after the last image."""

    prefill: Prefill
    words: Sequence[int]
    words_after: Sequence[int]


class Reader(Protocol):
    """How one library's model reads a prompt once more, and how its ids are texts."""

    def read(self, request: Request) -> Any: ...

    def text(self, ids: list[int]) -> str: ...

    def name(self, token: int) -> str:
        """A token's text; of a special one, which has none, what the vocabulary calls it."""
        ...


class VLMReader:
    """One of our models."""

    def __init__(self, model: VLM, processor: Processor):
        self.model, self.processor = model, processor
        self.text = processor.tokenizer.decode

    def name(self, token: int) -> str:
        return self.text([token]) or self.processor.tokenizer.backend.id_to_token(token) or ""

    @contextmanager
    def read(self, request: Request) -> Iterator[ReadPrompt]:
        """Read a request's prompt. Raises UserError."""
        pipeline = pipeline_for(self.model, request.pruner)
        K = budget(self.model.N, request.keep_ratio, request.keep_tokens, pipeline)
        prompt = prepare_request(self.model, self.processor, request)
        ids, runs = prompt.prompt.ids, prompt.prompt.runs
        prefill = self.model([prompt.prompt], prompt.pixels, pipeline, K, request.positions)
        words = [ids[i] for i in outside(runs, len(ids))]
        yield ReadPrompt(prefill, words, ids[sum(runs[-1]) :])


class HostReader:
    """A model of mlx-vlm's."""

    def __init__(self, model: Any, processor: Any):
        self.host = host_of(model, processor)
        self.tokenizer = getattr(self.host.processor, "tokenizer", self.host.processor)

    def text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids))

    def name(self, token: int) -> str:
        return self.text([token]) or str(self.tokenizer.convert_ids_to_tokens(token))

    @contextmanager
    def read(self, request: Request) -> Iterator[ReadPrompt]:
        """Read a request's prompt; the model goes on from it inside the block. Raises UserError."""
        host, pipeline = self.host, plan_for_host(self.host, request.pruner)
        policy = check_pipeline(host, pipeline, request.positions)
        images = [open_image(source, request.pixel_limit) for source in request.images]
        inputs = host_prompt.prepare_prompt(
            host, request.prompt, images, request.chat_template_config, system=request.system
        )
        placeholder, ids = host.image_token_id(inputs), inputs.ids
        last = max((i for i, token in enumerate(ids) if token == placeholder), default=-1)
        with host.preserve_state(), generation_stream():
            budget = host_prompt.ImageBudget(request.keep_ratio, request.keep_tokens)
            by_view = budget.by_view(pipeline)
            views = host_prompt.encode_images_and_text(host, inputs, pipeline, by_view)
            budgets = by_view(views)
            prompt = host_prompt.prune_prompt(host, inputs, views, pipeline, budgets, policy)
            prompt = prefill_through_cuts(host, prompt, pipeline, budgets, policy)
            words = [token for token in ids if token != placeholder]
            yield ReadPrompt(HostPrefill(host, prompt), words, ids[last + 1 :])


@dataclass
class Explorer:
    """Asks one model the same about the same images, by one method after another.

    `options` are those of `generate` that all answers have in common. With `predicts` times are
    predicted too.
    """

    model: Any
    processor: Any
    prompt: str
    images: Sequence[Any]
    options: Mapping[str, Any]
    answer: Answer
    predicts: bool = True
    full: GenerationResult | None = field(default=None, init=False)
    times: PredictedTimes | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        model, processor = self.model, self.processor
        if isinstance(model, VLM):
            self.reader: Reader = VLMReader(model, processor)
            times: PredictedTimes = CalibratedTimes(
                model, processor, self.prompt, self.images, self.options
            )
        else:
            self.reader = reader = HostReader(model, processor)
            times = CountedTimes(reader.host, partial(self.answer, **self.options))
        self.times = times if self.predicts else None

    def explore(self, case: BudgetedMethod, command: str) -> ExploredAnswer:
        """The answer with a budget; that with all tokens comes first. Raises UserError."""
        is_full = case.spec == "none"
        budget = {"keep_tokens" if isinstance(case.K, int) else "keep_ratio": case.K}
        chosen = {**self.options, "pruner": case.pipeline, **({} if is_full else budget)}
        self.answer(**{**chosen, "max_tokens": 1})  # warm
        result = self.answer(**chosen)
        if is_full:
            self.full = result
        assert self.full, "the full answer comes first"
        request = Request(self.prompt, self.images, **chosen)
        logprobs, words = self._read_again(request, result)
        predicted_ms = None  # with all tokens from another method's calibration: `predict_full`
        if self.times and not is_full:
            predict = partial(self.times.of_answer, case, self.full, result)
            predicted_ms = predict_or_warn(case.pipeline, predict)
        return ExploredAnswer(
            result, None if is_full else case.K, command, self._texts(result.token_ids),
            predicted_ms, logprobs, words,
        )  # fmt: skip

    def _read_again(
        self, request: Request, result: GenerationResult
    ) -> tuple[dict[str, dict[str, list[float]]], list[WordAttention]]:
        """Log-probabilities of the full answer's tokens and of this one's, both ways; words."""
        assert self.full
        with observing_words() as choices, self.reader.read(request) as read:
            is_same = result.token_ids == self.full.token_ids
            of_full = logprobs_of(read.prefill, self.full.token_ids)
            of_this = of_full if is_same else logprobs_of(read.prefill, result.token_ids)
            words = word_attention(choices, read, self.reader.name)
        if result is self.full:
            self.full_request, self.full_logprobs = request, of_full
            return {"full_answer": {"full": of_full}}, words
        this_full = self.full_logprobs
        if not is_same:
            with self.reader.read(self.full_request) as read:
                this_full = logprobs_of(read.prefill, result.token_ids)
        return {
            "full_answer": {"full": self.full_logprobs, "pruned": of_full},
            "answer": {"full": this_full, "pruned": of_this},
        }, words

    def _texts(self, ids: Sequence[int]) -> list[str]:
        """What each token adds to the text."""
        texts = [self.reader.text(list(ids[:n])) for n in range(len(ids) + 1)]
        return [
            after[len(before) :] if after.startswith(before) else self.reader.text([token])
            for before, after, token in zip(texts, texts[1:], ids, strict=False)
        ]

    def predict_full(self, pipeline: Pipeline) -> dict[str, float] | None:
        """The predicted time with all visual tokens, from what is known of a method."""
        if self.times is None:
            return None
        return predict_or_warn(pipeline, partial(self.times.of_full, pipeline))


def logprobs_of(prefill: Prefill, ids: Sequence[int]) -> list[float]:
    """The log-probability of each token of an answer, in nats; the prefill stays as it is."""
    if not ids:
        return []
    return [float(x) for x in token_logprobs(prefill, np.array([list(ids)]))[0]]


def word_attention(
    choices: Sequence[WordChoice], read: ReadPrompt, name: Callable[[int], str]
) -> list[WordAttention]:
    """What each word attended to, at the steps of the trace that the choices made.

    Choices are noted in the order of steps and views, and each is that of one place: of two images
    that are the same, each has its own.
    """
    trace, words = read.prefill.trace, []
    rows = [(choice, row) for choice in choices for row in range(len(choice.words_BTN))]
    for step in range(len(trace.steps)):
        for view in range(len(trace.sizes)):
            for number, (choice, row) in enumerate(rows):
                if attentions := _attention_at(choice, row, (step, view), trace, read, name):
                    words += attentions
                    del rows[number]
                    break
    return words


def _attention_at(
    choice: WordChoice, row: int, place: tuple[int, int], trace: Trace, read: ReadPrompt,
    name: Callable[[int], str],
) -> list[WordAttention]:  # fmt: skip
    """One row of a choice, if it is the one that made this step of this view."""
    step, view = place
    N, before = trace.sizes[view], np.arange(trace.sizes[view])
    if step and (index := trace.steps[step - 1].reductions[view].kept_tokens()) is not None:
        before = index[0]
    after, chosen = trace.steps[step].reductions[view].kept_tokens(), choice.kept.kept_tokens()
    attention_Tn = np.array(choice.words_BTN[row].astype(mx.float32))
    is_named = choice.name in trace.steps[step].name.partition(",")[0].split("+")
    if after is None or chosen is None or not is_named or attention_Tn.shape[1] != len(before):
        return []
    if not np.array_equal(before[chosen[row]], after[0]):
        return []
    if choice.real_BT is not None and choice.real_BT.shape[1] == len(attention_Tn):
        attention_Tn = attention_Tn[np.array(choice.real_BT[row])]
    sources = {len(ids): ids for ids in (read.words, read.words_after)}
    ids = sources.get(len(attention_Tn), range(len(attention_Tn)))
    is_known = len(attention_Tn) in sources
    labels = [name(token) if is_known else f"word {token + 1}" for token in ids]
    attention_TN = np.full((len(attention_Tn), N), np.nan)
    attention_TN[:, before] = attention_Tn
    return [WordAttention(step, view, labels, attention_TN)]
