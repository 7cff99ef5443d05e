"""How long each method takes to the first token, for questions of the set asked one at a time.

An evaluation asks in batches and encodes a picture once for all methods, so its own times compare
nothing. Here each question is a request of its own, as `generate` would answer it: from the
picture's file to the first token, with the tower, the pruner and the language model inside, and
with the twig that reads along where it drafts. Methods take turns, and each question begins with
another one, so that a machine that grows slower does so for all. Drawn pictures are drawn before.
"""

import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tqdm import tqdm

from ..generation import stream
from ..generation.request import Request
from ..hosts import stream as host_stream
from ..machine.clock import Timings
from ..models.vlm import VLM
from .budgeted_methods import BudgetedMethod
from .questions import ClipFile, Question


def measure_first_tokens(
    model: Any, processor: Any, questions: Sequence[Question],
    methods: Sequence[BudgetedMethod], options: Mapping[str, Any],
) -> list[dict[str, float]]:  # fmt: skip
    """For each method the median milliseconds to the first token by part, and the p10 and p90 of
    the total.

    A method's first request, of the first question, is not counted; `options` are those of all
    requests. Raises UserError.
    """
    times: list[list[Timings]] = [[] for _ in methods]
    requests = len(methods) * (len(questions) + 1)
    with tqdm(total=requests, desc="first tokens", file=sys.stderr) as bar:
        for n, question in enumerate([questions[0], *questions]):
            if callable(question.image):
                question = replace(question, image=_drawn(question))
            for turn in range(len(methods)):
                p = (turn + n) % len(methods)
                request = request_of(question, methods[p], options)
                measured = first_token_times(model, processor, request)
                if n:
                    times[p].append(measured)
                bar.update()
    return [summary(of_method) for of_method in times]


def _drawn(question: Question) -> Any:
    """The picture itself, which takes no time to get."""
    assert callable(question.image)
    return question.image()


def request_of(question: Question, method: BudgetedMethod, options: Mapping[str, Any]) -> Request:
    """The request for a question's first token with a method."""
    is_count, seen, images = isinstance(method.K, int), question.image, list[Any]()
    if isinstance(seen, ClipFile):
        frames = {"video": seen.path, "fps": seen.fps, "max_frames": seen.max_frames}
        options = {**options, **frames}
    else:
        images = [seen, *question.more_images]  # the first is drawn by now
    return Request(
        question.text,
        images,
        pruner=method.pipeline, positions=method.pipeline.policy,
        keep_tokens=int(method.K) if is_count else None,
        keep_ratio=None if is_count else method.K, max_tokens=1, **options,
    )  # fmt: skip


def first_token_times(model: Any, processor: Any, request: Request) -> Timings:
    """The milliseconds to the first token by part. Raises UserError."""
    loop = stream if isinstance(model, VLM) else host_stream
    result = [*loop.stream_generate(model, processor, request)][-1].result
    assert result, "the last piece has the result"
    return result.ttft_ms


def summary(times: Sequence[Timings]) -> dict[str, float]:
    """Medians by part, without parts that were not timed alone; of the total p10 and p90 too."""
    by_part: dict[str, list[float]] = defaultdict(list)
    for timings in times:
        for part, ms in timings.items():
            if isinstance(ms, float):
                by_part[part].append(ms)
    figures = {part: statistics.median(ms) for part, ms in by_part.items()}
    total = sorted(by_part["total"])
    figures["p10"], figures["p90"] = (total[round(q * (len(total) - 1))] for q in (0.1, 0.9))
    return {name: round(ms, 2) for name, ms in figures.items()}
