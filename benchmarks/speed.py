"""How much sooner the first token comes: `python -m benchmarks.speed`.

Models of published sizes with random weights answer a photograph: opening its file, the tower,
the pruner, the projector, the prefill and new tokens are timed apart, and the time to the first
token is all of it, from the file on. Full and pruned take turns in one process, warm. Every
answer has the same number of tokens, since nothing ends it. Before measuring it says what the
operation count allows (mlx_vlm_prune/planning/operations.py), and beside each gain, how many times
as fast as full, stands the count's own. A gain is not told where the ratios spread by more than it
differs from 1 (benchmarks/timing.py). The last line is one JSON object of all figures.

Every option with "repeat" sweeps: each shape, batch, text and side is measured in turn with
all pruners and budgets.
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
from mlx_vlm_prune.machine.hardware import machine, versions
from mlx_vlm_prune.planning import operations
from mlx_vlm_prune.pruners import METHODS, PRESETS, Pipeline, plan
from mlx_vlm_prune.pruners.budget import tokens_for
from mlx_vlm_prune.pruners.spec import suggestion

from .command_line import finish, natural, parser, positive
from .model_shapes import SHAPES, TEXT_TOKENS, request, shape
from .printed_table import show
from .speed_ceiling import announce
from .timing import Gain, Run, alternate, spread

PRUNERS = (
    "random", "downsample", "tome", "cls_attention", "visionzip", "divprune", "fastv",
    "pyramiddrop",
)  # fmt: skip
RATIOS = (0.5, 0.25, 0.11)
# Each gain's name in results: what is timed, and what the operation count says of it.
TIMED = {"vision": "vision", "projector": "projector", "prefill": "prefill",
         "total": "first_token", "token": "decode"}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What a run is asked, all but the pruner."""

    shape: str
    batch: int
    text: int
    side: int | None

    @property
    def config(self) -> VLMConfig:
        return shape(self.shape, self.side)


@dataclass(frozen=True)
class Case:
    """A method and a budget of K tokens."""

    pipeline: Pipeline
    K: int
    work: operations.Operations

    @property
    def kept(self) -> float:
        """Of one image, in the average layer."""
        return sum(self.work.visual) / len(self.work.visual)


def cases(
    setting: Setting, stack: Any, specs: Sequence[str], budgets: Sequence[int]
) -> tuple[Case, list[Case], list[dict[str, Any]]]:
    """Full, all that can be, and why the others cannot."""
    config, refused, able = setting.config, [], []
    N = config.N
    for spec, K in itertools.product(specs, budgets):
        try:
            pipeline = plan(spec, stack.learned(K))
            pipeline.signal_layers(config.vision.depth)
            able.append(Case(pipeline, K, operations.count(config, setting.text, pipeline, K)))
        except UserError as e:
            refused.append({**asdict(setting), "pruner": spec, "budget": K, "why": str(e)})
    full = Case(plan("none"), N, operations.count(config, setting.text, plan("none"), N))
    return full, able, refused


def measure(
    setting: Setting, stack: Any, full: Case, pruned: Sequence[Case], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """One row of figures a case."""
    asked = request(setting.config, setting.text, setting.batch)
    runs = [
        partial(stack.run, asked, case.pipeline, case.K, args.tokens) for case in (full, *pruned)
    ]
    found: list[list[tuple[Run, Run]]] = [[] for _ in pruned]
    turns = (args.runs, args.warmup, args.share)
    for i, one, before in alternate(runs[0], runs[1:], *turns, f"{setting.shape}, runs"):
        found[i].append((before, one))
    return [row(setting, full, case, pairs) for case, pairs in zip(pruned, found, strict=True)]


def row(
    setting: Setting, full: Case, case: Case, pairs: Sequence[tuple[Run, Run]]
) -> dict[str, Any]:
    """What the runs of a case, each with the full run before it, come to."""
    kinds = {"full": [before for before, _ in pairs], "pruned": [one for _, one in pairs]}
    laps = {
        kind: {name: [run.figures[name] for run in runs] for name in runs[0].figures}
        for kind, runs in kinds.items()
    }
    gains = {}
    for name, counted in TIMED.items():
        predicted = getattr(full.work, counted) / getattr(case.work, counted)
        gain = Gain.of(laps["full"][name], laps["pruned"][name])
        gains[name] = gain.report(predicted)
    share = zip(laps["pruned"]["pruner"], laps["full"]["total"], strict=True)
    return {
        **asdict(setting), "pruner": case.pipeline.spec, "budget": case.K,
        "tokens": full.K, "kept": case.kept,
        "ms": {kind: {n: spread(ms) for n, ms in told.items()} for kind, told in laps.items()},
        "gain": gains,
        "pruner_share": spread([own / total for own, total in share])["median"],
        "operations": {"full": counted_work(full), "pruned": counted_work(case)},
        "cache_bytes": {kind: runs[0].cache_bytes for kind, runs in kinds.items()},
        "peak_bytes": {kind: _peak(runs) for kind, runs in kinds.items()},
    }  # fmt: skip


def counted_work(case: Case) -> dict[str, int]:
    """Multiply-adds of one prompt."""
    return {name: getattr(case.work, name) for name in ("vision", "projector", "prefill", "decode")}


def _peak(runs: Sequence[Run]) -> int | None:
    told = [run.peak_bytes for run in runs if run.peak_bytes is not None]
    return max(told) if told else None


def settings(args: argparse.Namespace) -> Iterator[Setting]:
    """Everything that is to be measured in turn."""
    for name in args.shape:
        for batch, text, side in itertools.product(args.batch, args.text, args.side):
            yield Setting(name, batch, text, side)


def budgets(args: argparse.Namespace, N: int) -> list[int]:
    """How many of N tokens to keep."""
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
    add("--keep-ratio", type=_ratio, action="append", help="repeat (default: 0.5, 0.25, 0.11)")
    add("--keep-tokens", type=positive, action="append", help="instead of ratios; repeat")
    add("--batch", type=positive, action="append", help="prompts at once; repeat (default: 1)")
    add("--text", type=positive, action="append", help="words of a prompt; repeat (default: 30)")
    add("--side", type=positive, action="append", help="pixels of a picture's side, which decide"
        " how many visual tokens there are; repeat (default: the shape's own)")  # fmt: skip
    add("--backend", choices=("mlx", "torch"), default="mlx", help="torch: the reference")
    add("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    add("--tokens", type=positive, default=8, help="new tokens of every answer (default: 8)")
    add("--runs", type=positive, default=20, help="measured runs of each case (default: 20)")
    add("--warmup", type=natural, default=1, help="runs before them (default: 1)")
    add("--share", type=positive, default=4, help="pruned runs after each full one (default: 4)")
    args = p.parse_args(argv)
    if args.keep_ratio and args.keep_tokens:
        raise UserError("give --keep-ratio or --keep-tokens, not both")
    args.shape, args.pruner = args.shape or [next(iter(SHAPES))], args.pruner or list(PRUNERS)
    args.batch, args.text = args.batch or [1], args.text or [TEXT_TOKENS]
    args.side = args.side or [None]
    for name in (one.split(":")[0] for one in "+".join(args.pruner).split("+")):
        if name not in (known := {**METHODS, **PRESETS}):  # refused before any is measured
            raise UserError(f"no pruner is called {name!r}; {suggestion(name, known)}")
    if "none" in args.pruner:
        raise UserError("--pruner none is what all are measured beside; name another")
    return args


def _ratio(text: str) -> float:
    try:
        told = float(text)
    except ValueError:
        told = 0.0
    if not 0 < told < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and below 1")
    return told


def backend(name: str) -> ModuleType:
    """Imported late: torch may be missing."""
    return import_module(f".backend_{name}", __package__)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure all settings, printing each; everything that was found."""
    host = backend(args.backend)
    rows, refused = [], []
    made: tuple[VLMConfig | None, Any] = None, None
    for setting in list(settings(args)):  # a wrong one is refused before any is measured
        budgets(args, setting.config.N)
    for setting in settings(args):
        config = setting.config
        if made[0] != config:
            made = config, host.Stack(config, args.dtype)
        able = budgets(args, config.N)
        announce(setting, args.dtype, f"{args.backend} on {host.device()}", able)
        full, pruned, impossible = cases(setting, made[1], args.pruner, able)
        refused += impossible
        if not pruned:
            raise UserError(impossible[0]["why"])
        rows += (measured := measure(setting, made[1], full, pruned, args))
        show(measured, impossible, args.runs)
    return {
        "benchmark": "speed", "backend": args.backend, "device": host.device(),
        "dtype": args.dtype, "runs": args.runs, "warmup": args.warmup, "share": args.share,
        "new_tokens": args.tokens, "machine": machine(), "versions": _versions(args.backend),
        "rows": rows, "refused": refused,
    }  # fmt: skip


def _versions(name: str) -> dict[str, str | None]:
    if name == "mlx":
        return versions()
    import torch

    return {**versions(), "torch": torch.__version__}


main = partial(finish, parse, run)


if __name__ == "__main__":
    main()
