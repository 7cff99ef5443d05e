"""Are budgets met, and is K needlessly small? `python -m benchmarks.budgets`.

Twenty questions of different lengths about drawn scenes, each a JPEG of another size, each with a
wish between what an eighth and seven eighths of the visual tokens are predicted to take. Each is
asked with the K that was chosen for it, then with a few tokens more. A budget is kept if
at least 18 are within their wish; K is needlessly small by a step if they would be with that many
tokens more, too. One calibration, on another picture, serves all. The last line is one JSON
object of the same figures.
"""

import argparse
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from io import BytesIO
from statistics import median
from typing import Any

import mlx.core as mx
from tqdm import tqdm

from mlx_vlm_prune import load
from mlx_vlm_prune.checkpoints.config import VLMConfig
from mlx_vlm_prune.generate import generate
from mlx_vlm_prune.generation.stream import prepare, resolve
from mlx_vlm_prune.machine.hardware import machine, versions
from mlx_vlm_prune.models.loading import Processor
from mlx_vlm_prune.models.vlm import VLM
from mlx_vlm_prune.planning.budgets import BudgetChoice, forecast, keep_within
from mlx_vlm_prune.planning.calibration import Calibration, measure
from mlx_vlm_prune.pruners.budget import tokens_for
from mlx_vlm_prune.scenes import HELD_OUT_SEEDS, compose

from .command_line import finish, natural, parser, positive

SHAPES = {"scenes": None, "minimind2-v-small": VLMConfig()}  # the built-in model; random weights
STEPS = (1 / 49, 1 / 16, 1 / 8, 1 / 4)  # of N: how many tokens more are tried
WORDS = "is there a red star in the picture what colour has the circle which letters".split()
ENOUGH = 0.9  # of the prompts are to be within their wish


@dataclass(frozen=True)
class Trial:
    """One prompt: its wish, what was chosen and predicted, and what it took with K and more."""

    words: int
    wish_ms: float
    tokens: int
    predicted_ms: float
    predicted_gb: float
    took_ms: float
    took_gb: float
    next_breaks: bool  # is K + 1 predicted to break the wish?
    more_ms: dict[int, float]  # with so many tokens more than K

    @property
    def off(self) -> float:
        return abs(self.took_ms / self.predicted_ms - 1)

    @property
    def gb_off(self) -> float:
        return abs(self.took_gb / self.predicted_gb - 1)


def model_of(shape: str) -> tuple[VLM, Processor]:
    """The built-in model, or one of random weights that reads the same words."""
    model, processor = load()
    config = SHAPES[shape]
    if config is None:
        return model, processor
    mx.random.seed(0)
    model = VLM(config)
    mx.eval(model.parameters())
    return model, replace(processor, name="random", folder=None)


def question(rng: random.Random) -> tuple[str, bytes]:
    """Some words, and a scene as a JPEG of some size."""
    words = [rng.choice(WORDS) for _ in range(rng.randint(2, 60))]
    scene, side = compose(rng.choice(HELD_OUT_SEEDS)).image(), rng.randint(224, 1200)
    file = BytesIO()
    scene.resize((side, side)).save(file, format="JPEG", quality=90)
    return " ".join(words), file.getvalue()


def chosen(
    model: VLM, processor: Processor, known: Calibration, rng: random.Random, options: dict
) -> tuple[BudgetChoice, dict[str, Any]]:
    """A choice for a prompt with a wish of its own; a wish that nothing is predicted to meet is
    drawn again, since nothing is promised then."""
    while True:
        words, picture = question(rng)
        told = {**options, "prompt": words, "image": picture, "calibration": known}
        workload = keep_within(model, processor, ms=1e-9, **told).workload  # whatever the budget
        eighth = model.N // 8
        low, high = forecast(known, workload, eighth, model.N - eighth)
        choice = keep_within(model, processor, ms=rng.uniform(low.ms_most, high.ms_most), **told)
        if choice.K < model.N:
            return choice, {"prompt": words, "image": picture, **options}


def trial(
    model: VLM, processor: Processor, known: Calibration, rng: random.Random, spec: str
) -> Trial:
    """One prompt, answered with K right after it was chosen, then with more, in any order."""
    options: dict[str, Any] = {"pruner": spec, "max_tokens": 1}
    choice, options = chosen(model, processor, known, rng, options)
    more = [tokens_for(model.N, share) for share in STEPS]
    more = [step for step in more if choice.K + step < model.N]
    took = {
        step: generate(model, processor, keep_tokens=choice.K + step, **options)
        for step in (0, *rng.sample(more, len(more)))
    }
    ms = {step: took[step].ttft_ms["total"] for step in sorted(took)}
    (after,) = forecast(known, choice.workload, choice.K + 1)
    assert choice.budget.ms
    return Trial(
        choice.workload.text, choice.budget.ms, choice.K, choice.expected.ms, choice.expected.gb,
        ms.pop(0), took[0].peak_memory, not choice.budget.allows(after.ms_most, after.gb), ms,
    )  # fmt: skip


def within(trials: list[Trial], step: int) -> tuple[int, int]:
    """How many of those that could be tried met their wish with so many tokens more."""
    tried = [(t.more_ms[step], t.wish_ms) for t in trials if step in t.more_ms]
    return sum(took <= wish for took, wish in tried), len(tried)


def show(spec: str, known: Calibration, seconds: float, trials: list[Trial]) -> dict[str, Any]:
    """Print a row a prompt and the sum; the figures of the sum."""
    print(f"\n{spec}: calibrated in {seconds:.0f} s; slack {known.slack - 1:.1%}")
    print(f"{'words':>6}{'wish ms':>9}{'K':>5}{'predicted':>11}{'took':>8}{'off':>8}  met")
    for t in trials:
        answer = "yes" if t.took_ms <= t.wish_ms else "no"
        print(f"{t.words:>6}{t.wish_ms:>9.1f}{t.tokens:>5}{t.predicted_ms:>11.1f}", end="")
        print(f"{t.took_ms:>8.1f}{t.off:>8.1%}  {answer}")
    met, n = sum(t.took_ms <= t.wish_ms for t in trials), len(trials)
    breaks = sum(t.next_breaks for t in trials)
    off, gb_off = median(t.off for t in trials), median(t.gb_off for t in trials)
    tried = sorted({step for t in trials for step in t.more_ms})
    held = {step: within(trials, step) for step in tried}
    print(f"Within the wish: {met} of {n}; one token more is predicted to break it: {breaks}")
    print(f"Predictions off by (median): time {off:.1%}, memory {gb_off:.2%}")
    print("Measured with more tokens, within the wish: ", end="")
    print(", ".join(f"+{step}: {ok} of {out_of}" for step, (ok, out_of) in held.items()))
    return {
        "pruner": spec, "slack": known.slack, "calibration_s": seconds, "met": met, "of": n,
        "next_breaks": breaks, "off": off, "gb_off": gb_off, "within_with_more": held,
        "enough": met >= ENOUGH * n, "trials": [asdict(t) for t in trials],
    }  # fmt: skip


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Calibrate and ask by each method, printing each; everything that was found."""
    model, processor = model_of(args.shape)
    pipelines = {spec: resolve(model, spec) for spec in args.pruner}  # refused before any is tried
    rng, rows = random.Random(args.seed), []
    for spec, pipeline in pipelines.items():
        words, image = question(rng)
        began = time.perf_counter()
        known = measure(model, pipeline, prepare(model, processor, words, image))
        seconds = time.perf_counter() - began
        bar = tqdm(range(args.prompts), desc=f"{spec}, asking", leave=False, file=sys.stderr)
        trials = [trial(model, processor, known, rng, spec) for _ in bar]
        rows.append(show(spec, known, seconds, trials))
    about = {"shape": args.shape, "N": model.N, "machine": machine(), "versions": versions()}
    return {**about, "rows": rows}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = parser("budgets", __doc__, names_result=True)
    p.add_argument("--shape", choices=SHAPES, default="minimind2-v-small")
    p.add_argument("--pruner", action="append", help="repeat (default: divprune and tome)")
    p.add_argument("--prompts", type=positive, default=20)
    p.add_argument("--seed", type=natural, default=0)
    args = p.parse_args(argv)
    args.pruner = args.pruner or ["divprune", "tome"]
    return args


main = partial(finish, parse, run)


if __name__ == "__main__":
    main()
