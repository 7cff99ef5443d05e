"""How soon are pages there, and how fast do they follow the slider? In Chromium, on this machine.

Pages of `explore` with 576 and 4,096 visual tokens: milliseconds to the first paint and to the
first drawn picture, and from a move of the slider until all of the page is drawn. Of the app, where
Gradio is installed: seconds from the command until a question can be typed.
"""

import argparse
import importlib.util
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.generation.exploration import Exploration, ExploredAnswer
from mlx_vlm_prune.generation.result import GenerationResult
from mlx_vlm_prune.machine.hardware import describe_machine, versions
from mlx_vlm_prune.pruners.contract import Reduction
from mlx_vlm_prune.pruners.trace import ReductionStep, Trace

from .command_line import parser, positive, run_command
from .server_process import server_process

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SIDES = (24, 64)  # patches along a side of the picture: 576 and 4,096 of them
SHARES = (0.125, 0.25, 0.5, 0.75)
DEPTH, STEPS = 32, 4
PIXELS = 1344
READY = """
new MutationObserver(() => {
  if (document.documentElement.dataset.ready) window.readyAt = window.readyAt || performance.now();
}).observe(document, { attributes: true, subtree: true, childList: true });
"""
PAINT = "performance.getEntriesByType('paint').find((e) => e.name === 'first-contentful-paint')"
MOVE = """
async (place) => {
  const input = document.getElementById("budget");
  const frame = () => new Promise((done) => requestAnimationFrame(done));
  await frame();
  const start = performance.now();
  input.value = place;
  input.dispatchEvent(new Event("input"));
  await frame(); // in which what is below the pictures is drawn
  await frame();
  return performance.now() - start;
}
"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    p = parser("page_fluidity", __doc__)
    p.add_argument("--runs", type=positive, default=5, help="times that each page is opened")
    return p.parse_args(argv)


def find_chromium() -> str | None:
    """The program of a Chromium of this machine; None where there is none."""
    return next(filter(None, map(shutil.which, CHROMIUM)), None)


@contextmanager
def chromium() -> Iterator[Any]:
    """A running browser without a window. Raises UserError where there is none."""
    if importlib.util.find_spec("playwright") is None:
        raise UserError("Playwright is not installed: pip install playwright")
    from playwright.sync_api import sync_playwright

    program = find_chromium()
    if program is None:
        raise UserError("there is no Chromium on this machine; apt-get install chromium brings it")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


def explored(side: int, pruner: str, share: float | None) -> ExploredAnswer:
    """An answer about a picture of noise, whose tokens leave at four steps: of a method that merges
    and scores, which is the most that a page has to draw."""
    rng, N = np.random.default_rng(0), side * side
    kept = [N] * STEPS if share is None else [round(N * share ** (n / STEPS)) for n in range(1, 5)]
    reductions = [_merging(rng, N, K) for K in kept]
    layers = [0, *accumulate([DEPTH // STEPS] * (STEPS - 1))]
    names = ["", *["fastv"] * (STEPS - 1)] if share is None else ["fastv"] * STEPS
    steps = [
        ReductionStep(name, layer, [reduction])
        for name, layer, reduction in zip(names, layers, reductions, strict=True)
    ]
    trace = Trace.of_images(steps, [N])
    pixels = rng.integers(0, 255, (PIXELS, PIXELS, 3), dtype=np.uint8)
    view = Image.fromarray(pixels).resize((64, 64)).resize((PIXELS, PIXELS))
    times: Any = dict(image=10.0, vision=200.0, pruner=3.0, prefill=400.0, total=613.0)
    words = [f"word{n}" for n in range(48)]
    result = GenerationResult(
        " ".join(words), [*range(48)], N, 48, 1.0, 1.0, 1.0, "length", N, kept[-1],
        [trace.kept(0)], pruner, "keep", times, trace.layers(DEPTH), trace=trace,
        views=[(view, (side, side))],
    )  # fmt: skip
    odds = {"full_answer": {"full": [-0.1] * 48, "pruned": [-0.5] * 48}}
    return ExploredAnswer(result, None if share is None else kept[-1], "", words, None, odds)


def _merging(rng: np.random.Generator, N: int, K: int) -> Reduction:
    """K of N tokens, into which the others are merged, with a score of each."""
    slot_N = rng.integers(0, K, N)
    index_K = np.sort(rng.choice(N, K, replace=False))
    slot_N[index_K] = np.arange(K)
    return Reduction(
        mx.array(index_K)[None], slot_BN=mx.array(slot_N)[None], share_BN=mx.ones((1, N)),
        score_BN=mx.array(rng.random((1, N))),
    )  # fmt: skip


def write_page(side: int, file: Path) -> None:
    """A page of two methods at four budgets."""
    answers = [explored(side, "none", None)]
    answers += [explored(side, name, share) for name in ("fastv", "tome") for share in SHARES]
    Exploration(answers, "What does the sign say?", timing="no run").save(file)


def time_page(browser: Any, file: Path, runs: int) -> dict[str, Any]:
    """Medians and the most of several runs, in milliseconds."""
    figures: dict[str, list[float]] = {"first_paint_ms": [], "drawn_ms": [], "slider_ms": []}
    for _ in range(runs):
        page = browser.new_context(
            viewport={"width": 1280, "height": 900}, bypass_csp=True
        ).new_page()
        page.add_init_script(READY)
        page.goto(file.as_uri())
        page.wait_for_function("window.readyAt")
        page.wait_for_function(PAINT)
        figures["first_paint_ms"].append(page.evaluate(f"{PAINT}.startTime"))
        figures["drawn_ms"].append(page.evaluate("window.readyAt"))
        places = [*range(len(SHARES) + 1), *range(len(SHARES))[::-1]]
        figures["slider_ms"] += [page.evaluate(MOVE, place) for place in places]
        page.context.close()
    return {
        "megabytes": file.stat().st_size / 1e6,
        **{name: {"median": median(ms), "most": max(ms)} for name, ms in figures.items()},
    }


def time_app(browser: Any, runs: int) -> dict[str, float] | None:
    """Seconds from the command of the app until a question can be typed; None without Gradio."""
    if importlib.util.find_spec("gradio") is None:
        return None
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        command = [sys.executable, "-m", "mlx_vlm_prune", "app", "--port", "0"]
        with server_process(command) as (_, address):
            page = browser.new_context().new_page()
            page.goto(address)
            page.locator("#question textarea").wait_for()
            seconds.append(time.perf_counter() - start)
            page.context.close()
    return {"median": median(seconds), "most": max(seconds)}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All pages, and the app."""
    with chromium() as browser, TemporaryDirectory() as folder:
        pages = {}
        for side in SIDES:
            file = Path(folder) / f"{side}.html"
            write_page(side, file)
            pages[str(side * side)] = time_page(browser, file, args.runs)
        app = time_app(browser, args.runs)
    for tokens, figures in pages.items():
        times = ", ".join(
            f"{name} {figures[name]['median']:.0f} (most {figures[name]['most']:.0f})"
            for name in ("first_paint_ms", "drawn_ms", "slider_ms")
        )
        print(f"{tokens} tokens, {figures['megabytes']:.2f} MB: {times}")
    if app:
        print(f"app: {app['median']:.2f} s until a question can be typed (most {app['most']:.2f})")
    return {"machine": describe_machine(), "versions": versions(), "pages": pages, "app": app}


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run_command(parse, run, argv)


if __name__ == "__main__":
    main()
