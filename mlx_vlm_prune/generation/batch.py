"""Several prompts at once through a model of ours: one prefill, one token loop.

Shapes: B prompts, I images over all prompts, V words.
"""

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import mlx.core as mx

from ..checkpoints.errors import UserError, short
from ..inputs.budget import budget
from ..inputs.image_sources import ImageSource, is_source
from ..inputs.processor import Processor
from ..machine.clock import request_clock
from ..models.vlm import VLM
from .request import GenerateOptions, Request, make_request
from .result import GenerationResult
from .steps import (
    check_first_logits,
    collect_answers,
    generate_step,
    make_chooser,
    naming_faulty_part,
)
from .stream import (
    PreparedPrompt,
    answer_ends,
    check_request,
    faulty_part,
    initial_result,
    pipeline_for,
    prepare_request,
)

BatchImages = Sequence[ImageSource | Sequence[ImageSource] | None]


def batch_requests(
    prompts: Sequence[str], images: BatchImages | None, options: Mapping[str, Any]
) -> list[Request]:
    """One request a prompt. Raises UserError."""
    if isinstance(prompts, str):
        raise UserError("prompts is one string; give a list of prompts")
    if not isinstance(prompts, Iterable):
        raise UserError(f"prompts is {short(prompts)}; give a list of prompts")
    prompts = list(prompts)
    images = [None] * len(prompts) if images is None else images
    if is_source(images) or not isinstance(images, Iterable):
        raise UserError(f"images is {short(images)}; give a list with an entry for each prompt")
    images = [*images]
    if len(images) != len(prompts):
        raise UserError(
            f"prompts are {len(prompts)} and images {len(images)}; give an entry for each prompt,"
            " which may be a list or None"
        )
    if options.get("num_draft_tokens") is not None:
        raise UserError("num_draft_tokens is for one prompt at a time; leave it out of a batch")
    if unknown := set(options) - GenerateOptions.__annotations__.keys():
        raise TypeError(f"batch_generate() got an unexpected argument {min(unknown)!r}")
    requests = []
    for number, (prompt, image) in enumerate(zip(prompts, images, strict=True), 1):
        with naming_prompt(number, len(prompts)):
            requests.append(make_request(prompt, image, options))
    return requests


@contextmanager
def naming_prompt(number: int, count: int) -> Iterator[None]:
    """A UserError inside says which prompt of a batch is at fault."""
    try:
        yield
    except UserError as problem:
        raise UserError(f"prompt {number} of {count}: {problem}") from problem


def generate_by_budget(
    model: VLM, processor: Processor, requests: Sequence[Request]
) -> list[GenerationResult]:
    """As `batch_generate`, for requests whose methods and budgets may differ: those that have the
    same are answered together."""
    numbers_by_budget = defaultdict[Any, list[int]](list)
    for number, request in enumerate(requests):
        spec = request.pruner if isinstance(request.pruner, str) else id(request.pruner)
        numbers_by_budget[spec, request.keep_ratio, request.keep_tokens].append(number)
    answers: dict[int, GenerationResult] = {}
    for numbers in numbers_by_budget.values():
        alike = [requests[number] for number in numbers]
        texts = batch_generate(model, processor, alike, numbers, len(requests))
        answers |= zip(numbers, texts, strict=True)
    return [answers[number] for number in range(len(requests))]


def batch_generate(
    model: VLM, processor: Processor, requests: Sequence[Request],
    numbers: Sequence[int] | None = None, count: int | None = None,
) -> list[GenerationResult]:  # fmt: skip
    """The answers of a model of ours to requests with the same options. Raises UserError.

    Where they are a part of `count` prompts, `numbers` are their places among these, from 0.
    """
    if not requests:
        return []
    request, clock, prompts = requests[0], request_clock(), list[PreparedPrompt]()
    check_request(processor, request)
    pipeline = pipeline_for(model, request.pruner)
    K = budget(model.N, request.keep_ratio, request.keep_tokens, pipeline)
    numbers, count = numbers or range(len(requests)), count or len(requests)
    for number, each in zip(numbers, requests, strict=True):
        with naming_prompt(number + 1, count):
            prompts.append(prepare_request(model, processor, each))
    pixels = [prompt.pixels for prompt in prompts if prompt.pixels is not None]
    pixels_IHW3 = clock.end_part("image", mx.concatenate(pixels)) if pixels else None
    mx.reset_peak_memory()
    rows = [prompt.prompt for prompt in prompts]
    choose_token = make_chooser(request, [row.ids for row in rows])
    with naming_faulty_part(partial(faulty_part, model, rows, pixels_IHW3)):
        with clock.running():
            prefill = model(rows, pixels_IHW3, pipeline, K, request.positions)
        first_B1 = clock.end_part("prefill", choose_token(prefill.logits_BV))
        check_first_logits(prefill.logits_BV)
    policy, depth = request.positions or pipeline.positions, model.config.text.num_hidden_layers
    results, first = [], 0
    for prompt, length in zip(prompts, prefill.rows, strict=True):
        trace = prefill.trace.of_views(first, first := first + len(prompt.visible))
        result = replace(
            prompt.shown_in(initial_result(trace, depth, pipeline, policy), model.grid),
            cache_bytes=prefill.cache_bytes // len(rows),
        )
        results.append(result.prefilled(length, clock.ttft()))
    steps = generate_step(prefill, first_B1, choose_token, request.max_tokens)
    return _answered(results, steps, processor, request)


def _answered(
    results: Sequence[GenerationResult],
    steps: Iterator[mx.array],
    processor: Processor,
    request: Request,
) -> list[GenerationResult]:
    """The results with the tokens that the steps (B, 1) give."""
    start = time.perf_counter()
    answers = collect_answers(steps, len(results), answer_ends(processor, request))
    seconds, peak_memory = time.perf_counter() - start, mx.get_peak_memory() / 1e9
    answered = []
    for result, ids in zip(results, answers, strict=True):
        ended = len(ids) < request.max_tokens
        tokens = len(ids) + ended
        answered.append(
            replace(
                result,
                text=processor.tokenizer.decode(ids),
                token_ids=ids,
                generation_tokens=tokens,
                generation_tps=(tokens - 1) / seconds if tokens > 1 and seconds else 0.0,
                peak_memory=peak_memory,
                finish_reason="stop" if ended else "length",
            )
        )
    return answered
