"""What answers kept and why, as plain data: for the page that draws it, and for programs.

Shapes: N visual tokens of a view, K slots.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checkpoints.errors import UserError
from ..checkpoints.reading.files import write_atomically
from ..machine.hardware import describe_machine, versions
from ..pruners import METHODS, Stage
from ..pruners.contract import Reduction
from ..pruners.trace import ReductionStep
from .explorer_page import render_page

if TYPE_CHECKING:
    from PIL import Image

    from .result import GenerationResult

FORMAT = 1  # of `as_json`
LARGEST_SIDE = 1024  # pixels of a picture on the page
LARGEST_PNG = 300_000  # bytes, above which a picture becomes a JPEG
DIGITS, LOGPROB_DIGITS = 4, 6  # of a score, of a log-probability
FIELDS = (
    "text", "token_ids", "finish_reason", "pruner", "positions", "visual_tokens",
    "visual_tokens_kept", "prompt_tokens", "generation_tokens", "prompt_tps", "generation_tps",
    "peak_memory", "cache_bytes", "ttft_ms", "kept_indices",
)  # fmt: skip
UNITS = {
    "ttft_ms": "milliseconds", "predicted_ms": "milliseconds", "logprobs": "nats",
    "cache_bytes": "bytes", "peak_memory": "GB (10^9 bytes)", "prompt_tps": "tokens per second",
    "generation_tps": "tokens per second", "score": "the method's own",
    "words": "share of attention, or cosine", "tokens": "visual tokens of an image",
    "share": "parts of an image's visual tokens",
}  # fmt: skip


@dataclass(frozen=True)
class WordAttention:
    """What each word of a prompt attends to at one step, (words, tokens of a view); NaN of tokens
    that had left."""

    step: int  # number of the trace's step
    view: int
    words: Sequence[str]
    attention_TN: np.ndarray


@dataclass(frozen=True)
class ExploredAnswer:
    """An answer, and what the page says of it beside what it holds itself.

    `budget` is what each image was to keep: an int of tokens, a float share, None of all.
    `tokens` are the texts of its tokens. `predicted_ms` has the parts of `ttft_ms`.
    `logprobs` are log-probabilities in nats, {"full_answer" | "answer": {"full" | "pruned":
    one of each token}}: of which answer, and with all visual tokens or with the kept ones.
    """

    result: GenerationResult
    budget: float | None = None
    command: str = ""
    tokens: Sequence[str] | None = None
    predicted_ms: Mapping[str, float] | None = None
    logprobs: Mapping[str, Mapping[str, Sequence[float]]] | None = None
    words: Sequence[WordAttention] = ()


@dataclass(frozen=True)
class Exploration:
    """Answers to one prompt about the same images, to look at side by side.

    Jupyter shows it as a page, `save` writes that page, `as_json` has its data. `command` repeats
    all of it; `refused` are methods that could not keep a budget, each with its reason: {"pruner",
    "why"} and, where it is about one budget, "tokens", as an answer's `budget`. `timing`
    says how times were taken; without it the page shows none. `prediction` says what predicted
    times come from.
    """

    answers: Sequence[ExploredAnswer]
    prompt: str = ""
    model: str = ""
    command: str = ""
    refused: Sequence[Mapping[str, Any]] = ()
    timing: str = "one run each, the first of a process among them"
    prediction: str = ""

    @classmethod
    def of(cls, *results: GenerationResult) -> Exploration:
        """Of answers alone; several of one method with as many tokens are numbered.

        Raises UserError where there is no image, or where the images differ.
        """
        answers: list[ExploredAnswer] = []
        count: Counter[tuple[str, int]] = Counter()
        for result in results:
            budget = kept_of_an_image(result)
            count[result.pruner, budget] += 1
            if result.pruner == "none":
                answers.append(ExploredAnswer(result))
                continue
            number = count[result.pruner, budget]
            name = result.pruner if number == 1 else f"{result.pruner} ({number})"
            answers.append(ExploredAnswer(replace(result, pruner=name), budget))
        exploration = cls(answers)
        exploration.check()
        return exploration

    def check(self) -> None:
        """Raises UserError for answers that no page can show together."""
        views = [
            [(grid, picture.size, sha256(picture.tobytes()).digest()) for picture, grid in views]
            for views in (each.result.views for each in self.answers)
        ]
        if not views or not views[0] or any(each.result.trace is None for each in self.answers):
            raise UserError("there is nothing to explore: the prompt had no image")
        if any(others != views[0] for others in views):
            raise UserError("the answers are not about the same images; explore them one by one")

    def as_json(self) -> dict[str, Any]:
        """All that the page draws; `units` says in what, and `format` is 1.

        `budgets` are those of the answers, {"tokens": K} or {"share": r} of each image, that of
        which least was kept first; an answer's `budget` is one of them, or None.
        `answers` have a row for each answer: `generate`'s figures by its names, and `steps`, what
        was left of every view of an image after each step: `kept` are indices in the view's grid,
        `slot` is the slot that each patch went to, -1 for none, `size` how many patches each slot
        stands for, `score` and `rank` (from 1; 0 of those that had left) what decided.
        """
        first = self.answers[0].result
        return {
            "format": FORMAT,
            "units": UNITS,
            "prompt": self.prompt,
            "model": self.model,
            "command": self.command,
            "timing": self.timing,
            "prediction": self.prediction,
            "machine": describe_machine(),
            "versions": versions(),
            "depth": max((run["last"] + 1 for run in first.layers), default=0),
            "views": _views(first),
            "budgets": _budgets(self.answers),
            "answers": [answer_json(answer) for answer in self.answers],
            "methods": _methods(self.answers),
            "refused": [refusal_json(refusal) for refusal in self.refused],
        }

    def page(self) -> str:
        """The page: one HTML file that needs no network and no server."""
        return render_page(self.as_json())

    def save(self, path: str | Path) -> None:
        """Write the page; a file that is there is replaced. Raises UserError."""
        write_atomically(Path(path), self.page())

    def _repr_html_(self) -> str:
        """For Jupyter: the page in a frame of its own, whose scripts reach nothing outside it."""
        page = html.escape(self.page(), quote=True)
        return (
            '<iframe title="What the answer kept" sandbox="allow-scripts" srcdoc="'
            f'{page}" style="width:100%;height:860px;border:0"></iframe>'
        )


def kept_of_an_image(result: GenerationResult) -> int:
    """The visual tokens kept, on average over images and layers."""
    return round(result.visual_tokens_kept / max(1, len(result.kept_indices)))


def answer_json(answer: ExploredAnswer) -> dict[str, Any]:
    """An answer's row of `Exploration.as_json`."""
    result = answer.result
    assert result.trace is not None
    layers = [{name: run[name] for name in ("first", "last", "visual_tokens")}
              for run in result.layers]  # fmt: skip
    steps = [step_json(step, result.trace.sizes) for step in result.trace.steps]
    words = [
        {"step": each.step, "view": each.view, "words": [*each.words],
         "attention": [[rounded(x) for x in row] for row in each.attention_TN]}
        for each in answer.words
    ]  # fmt: skip
    return {
        **{name: getattr(result, name) for name in FIELDS},
        "budget": budget_json(answer.budget),
        "command": answer.command,
        "tokens": None if answer.tokens is None else [*answer.tokens],
        "predicted_ms": answer.predicted_ms and dict(answer.predicted_ms),
        "logprobs": _rounded_logprobs(answer.logprobs),
        "layers": layers,
        "steps": steps,
        "words": words,
    }


def budget_json(budget: float | None) -> dict[str, float] | None:
    """A budget with its unit, since JSON does not tell a share of 1.0 from one token."""
    if budget is None:
        return None
    return {"tokens" if isinstance(budget, int) else "share": budget}


def refusal_json(refusal: Mapping[str, Any]) -> dict[str, Any]:
    """A row of `refused`, its `tokens` as a `budget` with its unit."""
    rest = {name: value for name, value in refusal.items() if name != "tokens"}
    return {**rest, "budget": budget_json(refusal["tokens"])} if "tokens" in refusal else rest


def step_json(step: ReductionStep, sizes: Sequence[int]) -> dict[str, Any]:
    """A step of the trace: where it holds from, and what it left of every view."""
    return {
        "name": step.name,
        "stage": _stage_of(step.name),
        "layer": step.layer,
        "tokens": step.rows,
        "views": [view_json(r, N) for r, N in zip(step.reductions, sizes, strict=True)],
    }


def view_json(reduction: Reduction, N: int) -> dict[str, Any]:
    """What is left of one view. Of slots that are pooled from everywhere `kept` is None, and
    `read` says how much of each patch is in them, the most as 1."""
    index = reduction.kept_tokens()
    facts: dict[str, Any] = {"kept": None if index is None else index[0].tolist()}
    if reduction.weight_BKN is not None:
        weight_KN = np.array(reduction.mixture(N)[0])
        slot_N = np.where((weight_KN > 0).any(axis=0), weight_KN.argmax(axis=0), -1)
        facts |= {"slot": slot_N.tolist(), "size": (weight_KN > 0).sum(axis=1).tolist()}
        if index is None:
            read_N = weight_KN.sum(axis=0)
            facts |= {"slot": None, "read": [rounded(x) for x in read_N / max(read_N.max(), 1e-12)]}
    elif reduction.slot_BN is not None:
        slot_N = np.array(reduction.slot_BN[0]).astype(int)
        size_K = np.bincount(slot_N[slot_N >= 0], minlength=reduction.slots)
        facts |= {"slot": slot_N.tolist(), "size": size_K.tolist()}
    if reduction.score_BN is not None:
        score_N = np.array(reduction.score_BN[0])
        facts |= {"score": [rounded(x) for x in score_N], "rank": ranks(score_N).tolist()}
    return facts


def ranks(score_N: np.ndarray) -> np.ndarray:
    """The place of each score, 1 of the highest, of equals the first; 0 of NaN."""
    is_absent_N = np.isnan(score_N)
    rank_N = np.zeros(len(score_N), int)
    order_N = np.argsort(np.where(is_absent_N, np.inf, -score_N), kind="stable")
    rank_N[order_N] = np.arange(1, len(score_N) + 1)
    return np.where(is_absent_N, 0, rank_N)


def rounded(value: float, digits: int = DIGITS) -> float | str | None:
    """A few digits of a number, as JSON can have it: NaN is None, infinity a word."""
    if math.isnan(value):
        return None
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return float(f"{value:.{digits}g}")


def picture_url(picture: Image.Image) -> str:
    """A picture as a data URL: lossless where that is small."""
    picture = picture.convert("RGB")
    picture.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    for kind, options in (("PNG", {"optimize": True}), ("JPEG", {"quality": 88})):
        file = io.BytesIO()
        picture.save(file, kind, **options)
        if file.tell() <= LARGEST_PNG:
            break
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def _views(result: GenerationResult) -> list[dict[str, Any]]:
    trace = result.trace
    assert trace is not None
    views, first, last_image = [], 0, -1
    for (picture, grid), N, image in zip(result.views, trace.sizes, trace.images, strict=True):
        first = first if image == last_image else 0
        views.append({"picture": picture_url(picture), "grid": [*grid], "tokens": N,
                      "image": image, "first": first})  # fmt: skip
        first, last_image = first + N, image
    return views


def _budgets(answers: Sequence[ExploredAnswer]) -> list[dict[str, float]]:
    """Every budget, that of which least was kept first, on average over methods."""
    kept: dict[tuple[str, float], list[int]] = {}  # by unit and number
    for answer in answers:
        for budget in (budget_json(answer.budget) or {}).items():
            kept.setdefault(budget, []).append(answer.result.visual_tokens_kept)
    order = sorted(kept, key=lambda budget: (mean(kept[budget]), budget))
    return [{unit: number} for unit, number in order]


def _methods(answers: Sequence[ExploredAnswer]) -> dict[str, dict[str, Any]]:
    """What the methods' own files say of them, by name."""
    specs = [part for a in answers for part in a.result.pruner.split("+")]
    names = dict.fromkeys(spec.partition(":")[0] for spec in specs)
    return {
        name: {
            "title": METHODS[name].summary,
            "stage": METHODS[name].stage.name.lower(),
            "reads_prompt": METHODS[name].reads_prompt,
            "source": METHODS[name].source,
        }
        for name in names
        if name in METHODS
    }


def _stage_of(name: str) -> str:
    """The stage at which a step happens, by the methods in its name; empty where none pruned."""
    methods = [METHODS[part] for part in name.partition(",")[0].split("+") if part in METHODS]
    stages = [method.stage for method in methods if method.stage is not Stage.ENHANCER]
    return stages[-1].name.lower() if stages else ""


def _rounded_logprobs(logprobs: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if logprobs is None:
        return None
    return {
        answer: {
            name: [rounded(x, LOGPROB_DIGITS) for x in values] for name, values in each.items()
        }
        for answer, each in logprobs.items()
    }
