"""Are budgets met, and is K needlessly small? `python -m benchmarks.budgets`.

Twenty prompts of different lengths about drawn scenes, each a JPEG of another size. Each has a
budget in milliseconds between the predictions for an eighth and for seven eighths of the visual
tokens, and is answered with the chosen K, then with a few more tokens. Budgets are met if at least
18 of the 20 answers are in time. K is needlessly small by a step if they are with so many more
tokens, too. There is one calibration, on another image. Models are ours and mlx-vlm's, whose
images become different numbers of tokens in Qwen2.5-VL. The last line is one JSON object of the
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
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.generate import generate
from mlx_vlm_prune.generation.request import Request
from mlx_vlm_prune.generation.stream import pipeline_for, prepare_prompt
from mlx_vlm_prune.hosts.families import host_of
from mlx_vlm_prune.hosts.families.pruner_defaults import plan_for_host
from mlx_vlm_prune.inputs.budget import tokens_for
from mlx_vlm_prune.machine.hardware import describe_machine, versions
from mlx_vlm_prune.models.vlm import VLM
from mlx_vlm_prune.planning import host_budgets, host_runs
from mlx_vlm_prune.planning.budgets import Budget, BudgetChoice, Forecast, forecast, keep_within
from mlx_vlm_prune.planning.calibration import measure
from mlx_vlm_prune.scenes import HELD_OUT_SEEDS, compose

from .command_line import natural, parser, positive, run_command
from .host_processors import processor_of
from .hosts import FAMILIES, SIZES

OURS = {"scenes": None, "minimind2-v-small": VLMConfig()}  # the built-in model; random weights
HOSTS = {f"{family}-{size}": (family, size) for family in FAMILIES for size in ("tiny", "mid")}
DEFAULT_PRUNERS = {"ours": ["divprune", "tome"], "hosts": ["divprune", "received_attention"]}
LEAST_SIDE, MOST_SIDE = 224, 1200  # pixels of a picture
STEPS = {f"1/{part}": 1 / part for part in (49, 16, 8, 4)}  # of N: additional tokens
VOCABULARY = "is there a red star in the picture what colour has the circle which letters".split()
DRAWS = 12  # of a prompt and a budget, until one needs pruning
REQUIRED_SHARE = 0.9  # of the prompts must meet their budget


@dataclass(frozen=True)
class Trial:
    """One prompt: its budget, the chosen K, the prediction, and the measured times and memory."""

    words: int
    wish_ms: float
    tokens: int
    of: int
    predicted_ms: float
    predicted_gb: float
    took_ms: float
    took_gb: float
    next_breaks: bool  # is K + 1 predicted to exceed the budget?
    more_ms: dict[str, float]  # with more tokens, by their share of N

    @property
    def ms_error(self) -> float:
        return abs(self.took_ms / self.predicted_ms - 1)

    @property
    def gb_error(self) -> float:
        return abs(self.took_gb / self.predicted_gb - 1)


def load_shape(shape: str) -> tuple[Any, Any]:
    """The built-in model, or one with random weights and the same tokenizer, or one of mlx-vlm's
    with random weights."""
    mx.random.seed(0)
    if shape in HOSTS:
        family, size = HOSTS[shape]
        model, _ = FAMILIES[family](SIZES[size])
        mx.eval(model.parameters())
        return model, processor_of(family, size, VOCABULARY)
    model, processor = load()
    config = OURS[shape]
    if config is None:
        return model, processor
    model = VLM(config)
    mx.eval(model.parameters())
    return model, replace(processor, name="random", folder=None)


def random_prompt(rng: random.Random, least_side: int = LEAST_SIDE) -> tuple[str, bytes]:
    """A prompt of 2 to 60 words, and a scene as a JPEG of up to MOST_SIDE pixels a side."""
    words = [rng.choice(VOCABULARY) for _ in range(rng.randint(2, 60))]
    scene, side = compose(rng.choice(HELD_OUT_SEEDS)).image(), rng.randint(least_side, MOST_SIDE)
    file = BytesIO()
    scene.resize((side, side)).save(file, format="JPEG", quality=90)
    return " ".join(words), file.getvalue()


def calibrate(model: Any, processor: Any, spec: str, rng: random.Random) -> Any:
    """The calibration of a method, on a picture of its own; as large as any for mlx-vlm's models,
    whose larger pictures would be calibrated again."""
    if isinstance(model, VLM):
        inputs = prepare_prompt(model, processor, *random_prompt(rng))
        return measure(model, pipeline_for(model, spec), inputs)
    host = host_of(model, processor)
    prompt, image = random_prompt(rng, MOST_SIDE)
    request = Request(prompt, [image], spec)
    return host_runs.measure(host_runs.open_prompt(host, plan_for_host(host, spec), request))


def choice_within(
    model: Any, processor: Any, calibration: Any, request: dict[str, Any], ms: float
) -> BudgetChoice:
    """K for a budget in milliseconds."""
    if isinstance(model, VLM):
        return keep_within(model, processor, ms=ms, calibration=calibration, **request)
    options = {**request, "images": [request["image"]]}
    del options["image"]
    return host_budgets.keep_within(model, processor, Request(**options), Budget(ms), calibration)


def choose_budget(
    model: Any, processor: Any, calibration: Any, rng: random.Random, options: dict[str, Any]
) -> tuple[BudgetChoice, dict[str, Any]]:
    """The choice for a random prompt and budget, and the prompt's arguments of `generate`.

    Drawn again if no K is predicted to meet the budget. Raises UserError where that goes on.
    """
    for _ in range(DRAWS):
        prompt, image = random_prompt(rng)
        request = {**options, "prompt": prompt, "image": image}
        choose = partial(choice_within, model, processor, calibration, request)
        any_choice = choose(1e-9)
        eighth = max(1, any_choice.N // 8)
        low, high = predictions(any_choice, eighth, any_choice.N - eighth)
        choice = choose(rng.uniform(low.ms_most, high.ms_most))
        if choice.K < choice.N:
            return choice, request
    raise UserError(
        f"of {DRAWS} budgets none needs fewer tokens; times of this model hardly depend on them"
    )


def predictions(choice: BudgetChoice, *K: int) -> list[Forecast]:
    """For other K of the same prompt."""
    assert choice.calibration
    return forecast(choice.calibration, choice.workload, *K)


def run_trial(
    model: Any, processor: Any, calibration: Any, rng: random.Random, spec: str
) -> Trial:  # fmt: skip
    """One prompt, answered with K right after the choice, then with more tokens in random order."""
    options: dict[str, Any] = {"pruner": spec, "max_tokens": 1}
    choice, options = choose_budget(model, processor, calibration, rng, options)
    steps = {share: tokens_for(choice.N, part) for share, part in STEPS.items()}
    steps = {share: step for share, step in steps.items() if choice.K + step < choice.N}
    more = sorted({*steps.values()})
    results = {
        step: generate(model, processor, keep_tokens=choice.K + step, **options)
        for step in (0, *rng.sample(more, len(more)))
    }
    ms = {share: results[step].ttft_ms["total"] for share, step in steps.items()}
    answer = results[0]
    (next_step,) = predictions(choice, choice.K + 1)
    next_breaks = not choice.budget.allows(next_step.ms_most, next_step.gb)
    assert choice.budget.ms
    return Trial(
        choice.workload.text, choice.budget.ms, choice.K, choice.N, choice.expected.ms,
        choice.expected.gb, answer.ttft_ms["total"], answer.peak_memory, next_breaks, ms,
    )  # fmt: skip


def count_met(trials: list[Trial], share: str) -> tuple[int, int]:
    """How many trials met their budget with a share of N more tokens, of how many have so many."""
    tried = [(t.more_ms[share], t.wish_ms) for t in trials if share in t.more_ms]
    return sum(ms <= budget_ms for ms, budget_ms in tried), len(tried)


def print_trials(spec: str, slack: float, seconds: float, trials: list[Trial]) -> dict[str, Any]:
    """Print a row for each prompt and a summary; the summary's figures."""
    print(f"\n{spec}: calibrated in {seconds:.0f} s; slack {slack - 1:.1%}")
    print(f"{'words':>6}{'wish ms':>9}{'K':>5}{'of':>5}{'predicted':>11}{'took':>8}{'off':>8}  met")
    for t in trials:
        answer = "yes" if t.took_ms <= t.wish_ms else "no"
        print(f"{t.words:>6}{t.wish_ms:>9.1f}{t.tokens:>5}{t.of:>5}{t.predicted_ms:>11.1f}", end="")
        print(f"{t.took_ms:>8.1f}{t.ms_error:>8.1%}  {answer}")
    met, n = sum(t.took_ms <= t.wish_ms for t in trials), len(trials)
    breaks = sum(t.next_breaks for t in trials)
    ms_error, gb_error = median(t.ms_error for t in trials), median(t.gb_error for t in trials)
    more = {share: count_met(trials, share) for share in STEPS}
    more = {share: counts for share, counts in more.items() if counts[1]}
    print(f"Within the wish: {met} of {n}; one token more is predicted to break it: {breaks}")
    print(f"Predictions off by (median): time {ms_error:.1%}, memory {gb_error:.2%}")
    print("Measured with more tokens, within the wish: ", end="")
    print(", ".join(f"+{share}: {count} of {total}" for share, (count, total) in more.items()))
    return {
        "pruner": spec, "slack": slack, "calibration_s": seconds, "met": met, "of": n,
        "next_breaks": breaks, "off": ms_error, "gb_off": gb_error, "within_with_more": more,
        "enough": met >= REQUIRED_SHARE * n, "trials": [asdict(t) for t in trials],
    }  # fmt: skip


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Calibrate and run the trials of each method, and print them; the result."""
    model, processor = load_shape(args.shape)
    rng, rows = random.Random(args.seed), []
    for spec in args.pruner:
        began = time.perf_counter()
        calibration = calibrate(model, processor, spec, rng)
        seconds = time.perf_counter() - began
        bar = tqdm(range(args.prompts), desc=f"{spec}, asking", leave=False, file=sys.stderr)
        trials = [run_trial(model, processor, calibration, rng, spec) for _ in bar]
        rows.append(print_trials(spec, calibration.slack, seconds, trials))
    header = {
        "shape": args.shape,
        "N": max(trial["of"] for row in rows for trial in row["trials"]),
        "machine": describe_machine(),
        "versions": versions(),
    }
    return {**header, "rows": rows}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = parser("budgets", __doc__, names_result=True)
    p.add_argument("--shape", choices=(*OURS, *HOSTS), default="minimind2-v-small", help="model")
    p.add_argument(
        "--pruner",
        action="append",
        help="a method; repeat (default: divprune and tome;"
        " received_attention in place of tome for mlx-vlm's models)",
    )
    p.add_argument("--prompts", type=positive, default=20, help="prompts of each pruner")
    p.add_argument("--seed", type=natural, default=0, help="of the images and budgets")
    args = p.parse_args(argv)
    args.pruner = args.pruner or DEFAULT_PRUNERS["hosts" if args.shape in HOSTS else "ours"]
    return args


main = partial(run_command, parse, run)


if __name__ == "__main__":
    main()
