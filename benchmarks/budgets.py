"""Are budgets met, and is K needlessly small? `python -m benchmarks.budgets`.

Twenty prompts of different lengths about drawn scenes, each a JPEG of another size. Each has a
budget in milliseconds between the predictions for an eighth and for seven eighths of the visual
tokens, and is answered with the chosen K, then with a few more tokens. Budgets are met if at least
18 of the 20 answers are in time. K is needlessly small by a step if they are with so many more
tokens, too. There is one calibration, on another image. The last line is one JSON object of the
same figures.
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
from mlx_vlm_prune.generation.stream import pipeline_for, prepare_prompt
from mlx_vlm_prune.inputs.processor import Processor
from mlx_vlm_prune.machine.hardware import describe_machine, versions
from mlx_vlm_prune.models.vlm import VLM
from mlx_vlm_prune.planning.budgets import BudgetChoice, forecast, keep_within
from mlx_vlm_prune.planning.calibration import Calibration, measure
from mlx_vlm_prune.pruners.budget import tokens_for
from mlx_vlm_prune.scenes import HELD_OUT_SEEDS, compose

from .command_line import natural, parser, positive, run_command

SHAPES = {"scenes": None, "minimind2-v-small": VLMConfig()}  # the built-in model; random weights
STEPS = (1 / 49, 1 / 16, 1 / 8, 1 / 4)  # of N: numbers of additional tokens
VOCABULARY = "is there a red star in the picture what colour has the circle which letters".split()
REQUIRED_SHARE = 0.9  # of the prompts must meet their budget


@dataclass(frozen=True)
class Trial:
    """One prompt: its budget, the chosen K, the prediction, and the measured times and memory."""

    words: int
    wish_ms: float
    tokens: int
    predicted_ms: float
    predicted_gb: float
    took_ms: float
    took_gb: float
    next_breaks: bool  # is K + 1 predicted to exceed the budget?
    more_ms: dict[int, float]  # by the number of tokens above K

    @property
    def ms_error(self) -> float:
        return abs(self.took_ms / self.predicted_ms - 1)

    @property
    def gb_error(self) -> float:
        return abs(self.took_gb / self.predicted_gb - 1)


def load_shape(shape: str) -> tuple[VLM, Processor]:
    """The built-in model, or one with random weights and the same tokenizer."""
    model, processor = load()
    config = SHAPES[shape]
    if config is None:
        return model, processor
    mx.random.seed(0)
    model = VLM(config)
    mx.eval(model.parameters())
    return model, replace(processor, name="random", folder=None)


def random_prompt(rng: random.Random) -> tuple[str, bytes]:
    """A prompt of 2 to 60 words, and a scene as a JPEG of 224 to 1200 pixels a side."""
    words = [rng.choice(VOCABULARY) for _ in range(rng.randint(2, 60))]
    scene, side = compose(rng.choice(HELD_OUT_SEEDS)).image(), rng.randint(224, 1200)
    file = BytesIO()
    scene.resize((side, side)).save(file, format="JPEG", quality=90)
    return " ".join(words), file.getvalue()


def choose_budget(
    model: VLM, processor: Processor, calibration: Calibration, rng: random.Random, options: dict
) -> tuple[BudgetChoice, dict[str, Any]]:
    """The choice for a random prompt and budget, and the prompt's arguments of `generate`.

    Drawn again if no K is predicted to meet the budget.
    """
    while True:
        prompt, image = random_prompt(rng)
        request = {**options, "prompt": prompt, "image": image, "calibration": calibration}
        workload = keep_within(model, processor, ms=1e-9, **request).workload  # of any budget
        eighth = model.N // 8
        low, high = forecast(calibration, workload, eighth, model.N - eighth)
        choice = keep_within(model, processor, ms=rng.uniform(low.ms_most, high.ms_most), **request)
        if choice.K < model.N:
            return choice, {"prompt": prompt, "image": image, **options}


def run_trial(
    model: VLM, processor: Processor, calibration: Calibration, rng: random.Random, spec: str
) -> Trial:
    """One prompt, answered with K right after the choice, then with more tokens in random order."""
    options: dict[str, Any] = {"pruner": spec, "max_tokens": 1}
    choice, options = choose_budget(model, processor, calibration, rng, options)
    more = [tokens_for(model.N, share) for share in STEPS]
    more = [step for step in more if choice.K + step < model.N]
    results = {
        step: generate(model, processor, keep_tokens=choice.K + step, **options)
        for step in (0, *rng.sample(more, len(more)))
    }
    ms = {step: results[step].ttft_ms["total"] for step in sorted(results)}
    (next_step,) = forecast(calibration, choice.workload, choice.K + 1)
    next_breaks = not choice.budget.allows(next_step.ms_most, next_step.gb)
    assert choice.budget.ms
    return Trial(
        choice.workload.text, choice.budget.ms, choice.K, choice.expected.ms, choice.expected.gb,
        ms.pop(0), results[0].peak_memory, next_breaks, ms,
    )  # fmt: skip


def count_met(trials: list[Trial], step: int) -> tuple[int, int]:
    """How many trials met their budget with `step` more tokens, of how many that have so many."""
    tried = [(t.more_ms[step], t.wish_ms) for t in trials if step in t.more_ms]
    return sum(ms <= budget_ms for ms, budget_ms in tried), len(tried)


def print_trials(
    spec: str, calibration: Calibration, seconds: float, trials: list[Trial]
) -> dict[str, Any]:
    """Print a row for each prompt and a summary; the summary's figures."""
    print(f"\n{spec}: calibrated in {seconds:.0f} s; slack {calibration.slack - 1:.1%}")
    print(f"{'words':>6}{'wish ms':>9}{'K':>5}{'predicted':>11}{'took':>8}{'off':>8}  met")
    for t in trials:
        answer = "yes" if t.took_ms <= t.wish_ms else "no"
        print(f"{t.words:>6}{t.wish_ms:>9.1f}{t.tokens:>5}{t.predicted_ms:>11.1f}", end="")
        print(f"{t.took_ms:>8.1f}{t.ms_error:>8.1%}  {answer}")
    met, n = sum(t.took_ms <= t.wish_ms for t in trials), len(trials)
    breaks = sum(t.next_breaks for t in trials)
    ms_error, gb_error = median(t.ms_error for t in trials), median(t.gb_error for t in trials)
    tried = sorted({step for t in trials for step in t.more_ms})
    more = {step: count_met(trials, step) for step in tried}
    print(f"Within the wish: {met} of {n}; one token more is predicted to break it: {breaks}")
    print(f"Predictions off by (median): time {ms_error:.1%}, memory {gb_error:.2%}")
    print("Measured with more tokens, within the wish: ", end="")
    print(", ".join(f"+{step}: {count} of {total}" for step, (count, total) in more.items()))
    return {
        "pruner": spec, "slack": calibration.slack, "calibration_s": seconds, "met": met, "of": n,
        "next_breaks": breaks, "off": ms_error, "gb_off": gb_error, "within_with_more": more,
        "enough": met >= REQUIRED_SHARE * n, "trials": [asdict(t) for t in trials],
    }  # fmt: skip


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Calibrate and run the trials of each method, and print them; the result."""
    model, processor = load_shape(args.shape)
    pipelines = {spec: pipeline_for(model, spec) for spec in args.pruner}
    rng, rows = random.Random(args.seed), []
    for spec, pipeline in pipelines.items():
        prompt, image = random_prompt(rng)
        began = time.perf_counter()
        calibration = measure(model, pipeline, prepare_prompt(model, processor, prompt, image))
        seconds = time.perf_counter() - began
        bar = tqdm(range(args.prompts), desc=f"{spec}, asking", leave=False, file=sys.stderr)
        trials = [run_trial(model, processor, calibration, rng, spec) for _ in bar]
        rows.append(print_trials(spec, calibration, seconds, trials))
    header = {
        "shape": args.shape,
        "N": model.N,
        "machine": describe_machine(),
        "versions": versions(),
    }
    return {**header, "rows": rows}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = parser("budgets", __doc__, names_result=True)
    p.add_argument("--shape", choices=SHAPES, default="minimind2-v-small", help="model")
    p.add_argument("--pruner", action="append", help="a method; repeat (default: divprune, tome)")
    p.add_argument("--prompts", type=positive, default=20, help="prompts of each pruner")
    p.add_argument("--seed", type=natural, default=0, help="of the images and budgets")
    args = p.parse_args(argv)
    args.pruner = args.pruner or ["divprune", "tome"]
    return args


main = partial(run_command, parse, run)


if __name__ == "__main__":
    main()
