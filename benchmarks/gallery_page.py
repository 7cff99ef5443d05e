"""docs/gallery.html: what every method keeps of the same pictures, on a page of `explore`.

`python -m benchmarks.gallery --explore PHOTO …` asks the built-in model about three scenes and the
photographs; `python -m benchmarks.gallery` puts its data into the page as it now is.
"""

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.generate import generate
from mlx_vlm_prune.generation.exploration import Exploration, ExploredAnswer
from mlx_vlm_prune.generation.explorer_page import render_page
from mlx_vlm_prune.generation.result import GenerationResult
from mlx_vlm_prune.pruners import METHODS, Stage
from mlx_vlm_prune.pruners.trace import ReductionStep, Trace

from .report import ROOT

PAGE = ROOT / "docs" / "gallery.html"
BUDGETS = (49, 98)
NAME = "the built-in model, which never saw a photograph"
COMMAND = "python -m benchmarks.gallery --explore"


def gallery(
    model: Any, processor: Any, question: str, images: Sequence[Image.Image], photographs: list[str]
) -> Exploration:
    """Every method for pictures at every budget that it can keep, each picture asked about by
    itself."""
    names = [name for name in usable_methods(model) if not METHODS[name].reads_frames]
    cases = [("none", model.N), *((n, K) for n in names if n != "none" for K in BUDGETS)]
    answers, refused = [], []
    for name, K in tqdm(cases, "answers", file=sys.stderr, leave=False):
        try:
            results = [
                generate(
                    model, processor, question, image, pruner=name, keep_tokens=K, max_tokens=4
                )
                for image in images
            ]
        except UserError as problem:
            refused.append({"pruner": name, "tokens": K, "why": str(problem)})
            continue
        budget = None if name == "none" else K
        answers.append(ExploredAnswer(joined(results), budget))
    command = " ".join([COMMAND, *photographs])
    return Exploration(answers, question, NAME, command, refused, timing="")


def usable_methods(model: Any) -> list[str]:
    """The methods that a model can have alone: no enhancers, and none that lacks its weights."""
    return [
        name
        for name, method in METHODS.items()
        if method.stage is not Stage.ENHANCER and (not method.learned or name in model.learned)
    ]


def joined(results: Sequence[GenerationResult]) -> GenerationResult:
    """Answers about one picture each as one about all of them, without times."""
    first, traces = results[0], [result.trace for result in results if result.trace]
    steps = [
        ReductionStep(same[0].name, same[0].layer, [r for step in same for r in step.reductions])
        for same in zip(*(trace.steps for trace in traces), strict=True)
    ]
    trace = Trace.of_images(steps, [N for t in traces for N in t.sizes])
    return replace(
        first,
        text="\n".join(f"{n}. {result.text}" for n, result in enumerate(results, 1)),
        trace=trace,
        layers=trace.layers(first.layers[-1]["last"] + 1),
        views=[view for result in results for view in result.views],
        kept_indices=[kept for result in results for kept in result.kept_indices],
        visual_tokens=sum(result.visual_tokens for result in results),
        visual_tokens_kept=sum(result.visual_tokens_kept for result in results),
        generation_tokens=sum(result.generation_tokens for result in results),
        ttft_ms=dict.fromkeys(first.ttft_ms),  # type: ignore[arg-type]  # none was timed
        prompt_tps=0.0, generation_tps=0.0,
    )  # fmt: skip


def content_of(page: str) -> dict[str, Any]:
    """The data that a page of `explore` holds."""
    block = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert block, "the page is one of `explore`"
    content: dict[str, Any] = json.loads(block[1])
    return content


def rendered_again(file: Path = PAGE) -> str:
    """A page with the same data, by the template and the scripts as they now are."""
    return render_page(content_of(file.read_text(encoding="utf-8")))
