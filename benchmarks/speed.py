"""How much sooner the first token comes: `python -m benchmarks.speed`.

Models of published sizes with random weights answer a prompt about a photograph. Timed are opening
the image file, tower, pruner, projector, prefill and new tokens; the time to first token is the sum
of all parts before it. Full and pruned runs alternate in one process after a warm-up. Every answer
has the same number of tokens. The speed-up that the operation count predicts is printed first
(mlx_vlm_prune/planning/operations.py) and beside each measured gain. A gain is reported only if its
ratios spread by no more than it differs from 1 (mlx_vlm_prune/machine/timing.py). The
last line is one JSON object of all figures.

Options with "repeat" sweep: each shape, batch, text and side is measured with all pruners and
budgets.
"""

import argparse
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

from mlx_vlm_prune.checkpoints.config import VLMConfig
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.inputs.budget import tokens_for
from mlx_vlm_prune.machine.hardware import describe_machine, versions
from mlx_vlm_prune.machine.timing import Gain, alternate, spread
from mlx_vlm_prune.planning.operations import Operations, count
from mlx_vlm_prune.pruners import Pipeline, check_names, plan

from .command_line import natural, parser, positive, run_command
from .model_shapes import SHAPES, TEXT_TOKENS, request, shape
from .printed_table import print_table
from .speed_ceiling import print_ceiling
from .timing import Run

PRUNERS = (
    "random", "downsample", "tome", "cls_attention", "visionzip", "divprune", "divprune+restore",
    "fastv", "pyramiddrop",
)  # fmt: skip
RATIOS = (0.5, 0.25, 0.11)
# Each gain's name in results: what is timed, and what the operation count says of it.
TIMED = {"vision": "vision", "projector": "projector", "prefill": "prefill",
         "total": "first_token", "token": "decode"}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """A shape and the size of its request; all that is measured but the pruner."""

    shape: str
    batch: int
    text: int
    side: int | None

    @property
    def config(self) -> VLMConfig:
        return shape(self.shape, self.side)


@dataclass(frozen=True)
class Case:
    """A pipeline of methods with a budget of K tokens, and its operation counts."""

    pipeline: Pipeline
    K: int
    operations: Operations

    @property
    def kept(self) -> float:
        """Visual tokens of one image, the mean over the layers."""
        return sum(self.operations.visual) / len(self.operations.visual)


def cases(
    setting: Setting, stack: Any, specs: Sequence[str], budgets: Sequence[int]
) -> tuple[Case, list[Case], list[dict[str, Any]]]:
    """Full, every case that is possible, and for each other one a row that says why not."""
    config, refused, possible = setting.config, [], []
    N = config.N
    for spec, K in itertools.product(specs, budgets):
        try:
            pipeline = plan(spec, stack.learned(K))
            pipeline.signal_layers(config.vision.depth)
            possible.append(Case(pipeline, K, count(config, setting.text, pipeline, K)))
        except UserError as e:
            refused.append({**asdict(setting), "pruner": spec, "budget": K, "why": str(e)})
    full = Case(plan("none"), N, count(config, setting.text, plan("none"), N))
    return full, possible, refused


def measure(
    setting: Setting, stack: Any, full: Case, pruned: Sequence[Case], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """One row of figures for each pruned case."""
    inputs = request(setting.config, setting.text, setting.batch)
    runs = [
        partial(stack.run, inputs, case.pipeline, case.K, args.tokens) for case in (full, *pruned)
    ]
    pairs: list[list[tuple[Run, Run]]] = [[] for _ in pruned]
    turns = (args.runs, args.warmup, args.share)
    for i, pruned_run, full_run in alternate(runs[0], runs[1:], *turns, f"{setting.shape}, runs"):
        pairs[i].append((full_run, pruned_run))
    return [
        row(setting, full, case, case_pairs) for case, case_pairs in zip(pruned, pairs, strict=True)
    ]


def row(
    setting: Setting, full: Case, case: Case, pairs: Sequence[tuple[Run, Run]]
) -> dict[str, Any]:
    """The figures of a case from its runs, each a pair of full and pruned."""
    kinds = {"full": [full_run for full_run, _ in pairs], "pruned": [run for _, run in pairs]}
    laps = {
        kind: {name: [run.figures[name] for run in runs] for name in runs[0].figures}
        for kind, runs in kinds.items()
    }
    gains = {}
    for name, counted in TIMED.items():
        predicted = getattr(full.operations, counted) / getattr(case.operations, counted)
        gain = Gain.of(laps["full"][name], laps["pruned"][name])
        gains[name] = gain.report(predicted)
    shares = zip(laps["pruned"]["pruner"], laps["full"]["total"], strict=True)
    return {
        **asdict(setting), "pruner": case.pipeline.spec, "budget": case.K,
        "tokens": full.K, "kept": case.kept,
        "ms": {
            kind: {part: spread(ms) for part, ms in parts.items()} for kind, parts in laps.items()
        },
        "gain": gains,
        "pruner_share": spread([ms / total for ms, total in shares])["median"],
        "operations": {"full": operation_counts(full), "pruned": operation_counts(case)},
        "cache_bytes": {kind: runs[0].cache_bytes for kind, runs in kinds.items()},
        "peak_bytes": {kind: _peak(runs) for kind, runs in kinds.items()},
    }  # fmt: skip


def operation_counts(case: Case) -> dict[str, int]:
    """Multiply-adds of one prompt, by part."""
    parts = ("vision", "projector", "prefill", "decode")
    return {part: getattr(case.operations, part) for part in parts}


def _peak(runs: Sequence[Run]) -> int | None:
    peaks = [run.peak_bytes for run in runs if run.peak_bytes is not None]
    return max(peaks) if peaks else None


def settings(args: argparse.Namespace) -> Iterator[Setting]:
    """Every combination of shape, batch, text and side."""
    for name in args.shape:
        for batch, text, side in itertools.product(args.batch, args.text, args.side):
            yield Setting(name, batch, text, side)


def budgets(args: argparse.Namespace, N: int) -> list[int]:
    """The budgets, of N tokens. Raises UserError for one that is not below N."""
    if args.keep_tokens:
        for K in args.keep_tokens:
            if not 1 <= K < N:
                raise UserError(f"--keep-tokens is {K}; of {N} visual tokens keep 1 to {N - 1}")
        return args.keep_tokens
    return [tokens_for(N, ratio) for ratio in args.keep_ratio or RATIOS]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = parser("speed", __doc__, names_result=True)
    add = p.add_argument
    add("--shape", action="append", help=f"{', '.join(SHAPES)}; repeat (default: the first)")
    add("--pruner", action="append", help="NAME, NAME:option=value or a chain; repeat")
    add(
        "--keep-ratio",
        type=share_of_tokens,
        action="append",
        help="repeat (default: 0.5, 0.25, 0.11)",
    )
    add("--keep-tokens", type=positive, action="append", help="instead of ratios; repeat")
    add("--batch", type=positive, action="append", help="prompts at once; repeat (default: 1)")
    add("--text", type=positive, action="append", help="words of a prompt; repeat (default: 30)")
    add("--side", type=positive, action="append", help="pixels of a picture's side, which decide"
        " how many visual tokens there are; repeat (default: the shape's own)")  # fmt: skip
    add("--backend", choices=("mlx", "torch"), default="mlx", help="torch is the reference")
    add("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of weights")
    add("--tokens", type=positive, default=8, help="new tokens of every answer")
    add("--runs", type=positive, default=20, help="measured runs of each case")
    add("--warmup", type=natural, default=1, help="warm-up runs of each case")
    add("--share", type=positive, default=4, help="pruned runs after each full one")
    args = p.parse_args(argv)
    if args.keep_ratio and args.keep_tokens:
        raise UserError("give --keep-ratio or --keep-tokens, not both")
    args.shape, args.pruner = args.shape or [next(iter(SHAPES))], args.pruner or list(PRUNERS)
    args.batch, args.text = args.batch or [1], args.text or [TEXT_TOKENS]
    args.side = args.side or [None]
    check_pruners(args.pruner)
    return args


def check_pruners(specs: Sequence[str]) -> None:
    """Refuse an unknown method or preset, and `none`, before any is measured."""
    check_names(specs)
    if "none" in specs:
        raise UserError("--pruner none is what all are measured beside; name another")


def share_of_tokens(text: str) -> float:
    try:
        ratio = float(text)
    except ValueError:
        ratio = 0.0
    if not 0 < ratio < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and below 1")
    return ratio


def backend(name: str) -> ModuleType:
    """The module of a backend, imported only when it is used: torch may be missing."""
    return import_module(f".backend_{name}", __package__)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and print every setting; the result."""
    module = backend(args.backend)
    rows, refused = [], []
    stack: Any = None
    stack_config: VLMConfig | None = None
    for setting in list(settings(args)):  # a wrong one is refused before any is measured
        budgets(args, setting.config.N)
    for setting in settings(args):
        config = setting.config
        if stack_config != config:
            stack_config, stack = config, module.Stack(config, args.dtype)
        kept = budgets(args, config.N)
        print_ceiling(setting, args.dtype, f"{args.backend} on {module.device()}", kept)
        full, pruned, impossible = cases(setting, stack, args.pruner, kept)
        refused += impossible
        if not pruned:
            raise UserError(impossible[0]["why"])
        rows += (measured := measure(setting, stack, full, pruned, args))
        print_table(measured, impossible, args.runs)
    return {
        "benchmark": "speed", "backend": args.backend, "device": module.device(),
        "dtype": args.dtype, "runs": args.runs, "warmup": args.warmup, "share": args.share,
        "new_tokens": args.tokens, "machine": describe_machine(),
        "versions": _versions(args.backend),
        "rows": rows, "refused": refused,
    }  # fmt: skip


def _versions(name: str) -> dict[str, str | None]:
    if name == "mlx":
        return versions()
    import torch

    return {**versions(), "torch": torch.__version__}


main = partial(run_command, parse, run)


if __name__ == "__main__":
    main()
