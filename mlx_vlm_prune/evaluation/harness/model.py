"""The classes that lmms-eval loads for `--model mlx_vlm_prune`.

`PrunedModel` is asked by messages, with texts and pictures in the task's order, `SimplePrunedModel`
(`--force_simple`) by a text and its pictures. The interface is
`lmms_eval.api.model.lmms` of github.com/EvolvingLMMs-Lab/lmms-eval.
"""

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from tqdm import tqdm

from ...checkpoints.errors import UserError
from ...generation.request import Request
from ...generation.stream import default_pruner
from ...hosts.auto import choose_method
from ...hosts.loading import load
from ...models.vlm import VLM
from ...pruners import AUTO
from .answering import TaskAnswer, TaskQuestion, answer_questions, naming_question, running_batch
from .messages import TaskPrompt, read_messages, read_text
from .options import Decoding, RunOptions, read_generation_kwargs, read_run_options


class PrunedModel(lmms):
    """A model of ours or of mlx-vlm's. Raises UserError for whatever cannot be answered, and never
    gives an empty answer in its place."""

    is_simple = False

    def __init__(self, **model_args: Any) -> None:
        """`model_args` are those of `RunOptions`. Raises UserError."""
        super().__init__()
        self.options: RunOptions = read_run_options(model_args)
        options = self.options
        self.model, self.processor = load(
            options.model, dtype=options.dtype, revision=options.revision,
            adapter_path=options.adapter_path,
        )  # fmt: skip
        if options.pruner == AUTO or (options.is_auto and default_pruner(self.model) == "none"):
            choice = choose_method(
                self.model, self.processor, options.keep_ratio, options.keep_tokens,
                is_batched=True, is_timed=False,
            )  # fmt: skip
            self.options = options = replace(options, **choice.options)
        with running_batch(self.model, self.processor, options):
            pass  # a mistake in the method would end every question

    def generate_until(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """The answer to each request, in their order."""
        repeats = Counter[int]()
        questions = []
        for request in requests:
            with naming_question(question_name(request)):
                questions.append(self.question(request, repeats[id(request)]))
            repeats[id(request)] += 1
        answers: dict[int, TaskAnswer] = {}
        start = time.perf_counter()
        with running_batch(self.model, self.processor, self.options) as batch:
            pairs = answer_questions(batch, questions, self.options.batch_size)
            for number, answer in self.shown(pairs, len(questions)):
                answers[number] = answer
        listed = [answers[number] for number in range(len(questions))]
        log_figures(listed, time.perf_counter() - start)
        return [
            GenerationResult(
                answer.text, TokenCounts(answer.prompt_tokens, answer.generation_tokens)
            )
            for answer in listed
        ]

    def question(self, request: Any, turn: int) -> TaskQuestion:
        """A request as it is asked for the time number `turn`, from 0. Raises UserError."""
        _, doc_to_messages, kwargs, doc_id, task, split = request.args
        decoding = read_generation_kwargs(kwargs, self.options, turn)

        def make_prompt() -> TaskPrompt:
            messages = doc_to_messages(self.task_dict[task][split][doc_id])
            return read_messages(messages, isinstance(self.model, VLM))

        return self.task_question(request, make_prompt, decoding)

    def task_question(
        self, request: Any, make_prompt: Callable[[], TaskPrompt], decoding: Decoding
    ) -> TaskQuestion:
        """A question whose prompt is made when its turn comes."""
        make = partial(self.make_request, make_prompt, decoding)
        return TaskQuestion(question_name(request), make, decoding.until)

    def make_request(self, make_prompt: Callable[[], TaskPrompt], decoding: Decoding) -> Request:
        """What is asked of the model. Raises UserError."""
        prompt = make_prompt()
        system = prompt.system if self.options.system is None else self.options.system
        return Request(
            prompt.text, prompt.images, system=system, history=prompt.history,
            **self.options.request, **decoding.request,
        )  # fmt: skip

    def shown(self, pairs: Iterable[Any], count: int) -> Any:
        """The same with a bar on stderr, of the first process alone."""
        is_quiet = self.rank != 0
        return tqdm(pairs, total=count, desc="Model Responding", file=sys.stderr, disable=is_quiet)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Raises UserError: lmms-eval 0.7.3 takes every model's losses for texts, and fails."""
        raise UserError(
            f"{question_name(requests[0])} compares losses of given answers, which lmms-eval 0.7.3"
            " cannot; choose a task that asks for answers"
        )

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Raises UserError: a task that goes on by what was answered is not possible."""
        raise UserError(f"{question_name(requests[0])} has several rounds, which are not possible")


class SimplePrunedModel(PrunedModel):
    """The same for tasks that give a text and pictures."""

    is_simple = True

    def question(self, request: Any, turn: int) -> TaskQuestion:
        """A request as it is asked for the time number `turn`, from 0. Raises UserError."""
        text, kwargs, doc_to_visual, doc_id, task, split = request.args
        decoding = read_generation_kwargs(kwargs, self.options, turn)

        def make_prompt() -> TaskPrompt:
            images = pictures(doc_to_visual(self.task_dict[task][split][doc_id]))
            return TaskPrompt(read_text(text, len(images), isinstance(self.model, VLM)), images)

        return self.task_question(request, make_prompt, decoding)


def question_name(request: Any) -> str:
    """What a sentence calls a request."""
    return f"question {request.doc_id} of {request.task_name}"


def pictures(visuals: Any) -> list[Any]:
    """What a task shows, if it is pictures. Raises UserError for videos and sounds, which lmms-eval
    gives as paths and mappings."""
    for visual in visuals or []:
        if not hasattr(visual, "convert"):
            raise UserError("it shows something that is no picture; videos and sounds are not read")
    return [*(visuals or [])]


def log_figures(answers: Sequence[TaskAnswer], seconds: float) -> None:
    """lmms-eval's own figures of a run, and how many visual tokens the model read of how many."""
    tokens = sum(answer.generation_tokens for answer in answers)
    known = [answer.figures for answer in answers if answer.figures]
    log_metrics(
        total_elapsed_time=seconds,
        total_gen_tokens=tokens,
        avg_speed=tokens / seconds if seconds else 0.0,
        additional_metrics={
            "num_requests": len(answers),
            "visual_tokens": sum(figures.visual_tokens for figures in known),
            "visual_tokens_kept": sum(figures.visual_tokens_kept for figures in known),
        },
    )
