"""The five founding systems' claims beside what is measured: `python -m benchmarks.claims`.

The same method, on a model of the kind it was made for, with random weights; full and pruned take
turns in one process. Everything from the image's file on is inside the time, and beside it
stands what the authors timed. Writes benchmarks/results/claims.json with `--save`; accuracy
comes from the built-in model's evaluation, in benchmarks/results/scenes.json.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.machine.hardware import machine, versions

from . import backend_mlx
from .command_line import finish, parser, positive
from .model_shapes import TEXT_TOKENS
from .speed import Setting, cases, measure
from .timing import times

ANSWER = 64  # tokens, of the answer whose whole time is told
SLOW, SLOWER = "llava-8", 4  # a shape whose runs take seconds, and how many times as rarely it runs


@dataclass(frozen=True)
class Claim:
    """A headline, and how its method is run here: K of N tokens of a shape.

    `timed` is what the authors timed, or None where `benchmarks.speculation` times it; `judged`
    the method and budget of 196 whose accuracy on scenes stands beside.
    """

    system: str
    says: str
    shape: str
    pruner: str
    K: int
    timed: str | None
    judged: tuple[str, int]


CLAIMS = (
    Claim(
        "[EfficientVLM](https://github.com/langchengg/EfficientVLM)",
        "1.52x tokens per second at 98 of 196 tokens",
        "minimind2-v-small", "attention_pool", 98, "answer", ("attention_pool", 49),
    ),
    Claim(
        "[fastvlm-token-pruning](https://github.com/aledevv/fastvlm-token-pruning)",
        "first token 80 % sooner (4.9x) at half of the tokens, \"excellent\" quality",
        "llava-8", "norm", 288, "tower_left_out", ("norm", 98),
    ),
    Claim(
        "[Vision-Token-Pruning](https://github.com/denis7-jean/ece1512-projectA)",
        "vision tower 43 % faster (1.76x) at half of the patches",
        "minimind2-v-small", "patch_norm", 98, "vision", ("patch_norm", 98),
    ),
    Claim(
        "[LightVLM](https://github.com/falenai/LightVLM)",
        "prefill 2x to 3x as fast at 144 of 576 tokens, less than 3 % lost",
        "llava-8", "mlp", 144, "prefill", ("mlp", 49),
    ),
    Claim(
        "[TwigVLM](https://arxiv.org/abs/2503.14075)",
        "99.2 % kept at 192 of 576 tokens on average; 2.54x as fast by its speculative decoding",
        "llava-8", "twig", 192, None, ("twig", 98),  # its drafting has a benchmark of its own
    ),
)  # fmt: skip


def measured(claim: Claim, stack: Any, args: argparse.Namespace) -> dict[str, Any]:
    """The row of `benchmarks.speed`, with the gains that this page tells."""
    setting = Setting(claim.shape, 1, TEXT_TOKENS, None)
    full, able, refused = cases(setting, stack, [claim.pruner], [claim.K])
    if refused:
        raise UserError(refused[0]["why"])
    row = measure(setting, stack, full, able, args)[0]
    return {**row, "runs": args.runs, "gains": gains(row["ms"])}


def gains(ms: dict[str, dict[str, dict[str, float]]]) -> dict[str, float]:
    """How many times as fast in what the harness does not time by itself, from medians: `answer`,
    ANSWER tokens with everything inside, and `tower_left_out`, the pruned prefill beside the whole
    of full, as when features come from outside.
    """
    full, pruned = ({part: told["median"] for part, told in ms[kind].items()} for kind in ms)
    whole, less = (one["total"] + (ANSWER - 1) * one["token"] for one in (full, pruned))
    return {
        "answer": whole / less,
        "tower_left_out": full["total"] / (pruned["projector"] + pruned["prefill"]),
    }


def timed(claim: Claim, row: dict[str, Any]) -> str:
    """The gain in what the authors timed, and what that is; "?" where runs spread too much."""
    if claim.timed is None:
        return "see python -m benchmarks.speculation"
    gain = row["gain"].get(claim.timed)
    told = gain["realised"] if gain else row["gains"][claim.timed]
    if not gain and row["gain"]["total"]["realised"] is None:
        told = None
    return f"{times(told)} ({claim.timed.replace('_', ' ')})"


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Every claim in turn, each shape's model made once."""
    rows, stacks, often = [], dict[str, Any](), args.runs
    for claim in sorted(CLAIMS, key=lambda claim: claim.shape):
        if claim.shape not in stacks:
            args.runs = -(-often // SLOWER) if claim.shape == SLOW else often
            stacks = {
                claim.shape: backend_mlx.Stack(Setting(claim.shape, 1, 1, None).config, "float32")
            }
        rows.append({"system": claim.system, **measured(claim, stacks[claim.shape], args)})
        print(f"{claim.system}: claims {claim.says}")
        print(
            f"  {claim.pruner} on {claim.shape}, {claim.K} tokens: what they timed "
            f"{timed(claim, rows[-1])}, first token with everything inside "
            f"{times(rows[-1]['gain']['total']['realised'], 'not told')}",
            flush=True,
        )
    return {
        "benchmark": "claims", "device": backend_mlx.device(), "runs": often,
        "machine": machine(), "versions": versions(), "rows": rows,
    }  # fmt: skip


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = parser("claims", __doc__)
    told = "measured runs (default: 20; llava-8 a quarter)"
    p.add_argument("--runs", type=positive, default=20, help=told)
    args = p.parse_args(argv)
    args.tokens, args.warmup, args.share = 8, 1, 1
    return args


main = partial(finish, parse, run)


if __name__ == "__main__":
    main()
