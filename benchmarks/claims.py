"""The five founding systems' claims beside what is measured: `python -m benchmarks.claims`.

Each claim's method is timed on a model of the kind it was published for, with random weights; full
and pruned runs alternate in one process. Reported are the whole time to first token, from the image
file on, and the part that the authors timed. `--save` writes benchmarks/results/claims.json.
Accuracy is that of the built-in model, from benchmarks/results/scenes.json.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.machine.hardware import describe_machine, versions
from mlx_vlm_prune.machine.timing import times_text

from . import backend_mlx
from .command_line import parser, positive, run_command
from .model_shapes import TEXT_TOKENS
from .speed import Setting, cases, measure

ANSWER = 64  # tokens of the answer in the gain `answer`
SLOW_SHAPE = "llava-8"  # its runs take seconds
SLOW_DIVISOR = 4  # it has this times fewer runs


@dataclass(frozen=True)
class Claim:
    """A published headline, and how it is measured here: a method with K tokens of a shape.

    `timed` names the part that the authors timed; None: `benchmarks.speculation` times it. `judged`
    is the method and the budget, of 196 tokens, whose accuracy on scenes is reported.
    """

    system: str
    headline: str
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


def measure_claim(claim: Claim, stack: Any, args: argparse.Namespace) -> dict[str, Any]:
    """The row of `benchmarks.speed`, with the gains that the authors timed."""
    setting = Setting(claim.shape, 1, TEXT_TOKENS, None)
    full, pruned, refused = cases(setting, stack, [claim.pruner], [claim.K])
    if refused:
        raise UserError(refused[0]["why"])
    row = measure(setting, stack, full, pruned, args)[0]
    return {**row, "runs": args.runs, "gains": gains(row["ms"])}


def gains(ms: dict[str, dict[str, dict[str, float]]]) -> dict[str, float]:
    """Gains, from medians, in what `benchmarks.speed` does not time by itself.

    `answer`: an answer of ANSWER tokens, from the image file on. `tower_left_out`: the full time to
    first token by the pruned time of projector and prefill alone.
    """
    full, pruned = ({part: time["median"] for part, time in ms[kind].items()} for kind in ms)
    full_ms, pruned_ms = (run["total"] + (ANSWER - 1) * run["token"] for run in (full, pruned))
    return {
        "answer": full_ms / pruned_ms,
        "tower_left_out": full["total"] / (pruned["projector"] + pruned["prefill"]),
    }


def claimed_gain(claim: Claim, row: dict[str, Any]) -> str:
    """The gain in what the authors timed and its name; "?" for a gain that is not clear."""
    if claim.timed is None:
        return "see python -m benchmarks.speculation"
    gain = row["gain"].get(claim.timed)
    realised = gain["realised"] if gain else row["gains"][claim.timed]
    if not gain and row["gain"]["total"]["realised"] is None:
        realised = None
    return f"{times_text(realised)} ({claim.timed.replace('_', ' ')})"


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and print every claim; each shape's model is built once."""
    rows, stacks, runs = [], dict[str, Any](), args.runs
    for claim in sorted(CLAIMS, key=lambda claim: claim.shape):
        if claim.shape not in stacks:
            args.runs = -(-runs // SLOW_DIVISOR) if claim.shape == SLOW_SHAPE else runs
            stacks = {
                claim.shape: backend_mlx.Stack(Setting(claim.shape, 1, 1, None).config, "float32")
            }
        rows.append({"system": claim.system, **measure_claim(claim, stacks[claim.shape], args)})
        print(f"{claim.system}: claims {claim.headline}")
        print(
            f"  {claim.pruner} on {claim.shape}, {claim.K} tokens: what they timed "
            f"{claimed_gain(claim, rows[-1])}, first token with everything inside "
            f"{times_text(rows[-1]['gain']['total']['realised'], 'not told')}",
            flush=True,
        )
    return {
        "benchmark": "claims", "device": backend_mlx.device(), "runs": runs,
        "machine": describe_machine(), "versions": versions(), "rows": rows,
    }  # fmt: skip


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = parser("claims", __doc__)
    help_text = "measured runs (default: 20; llava-8 a quarter)"
    p.add_argument("--runs", type=positive, default=20, help=help_text)
    args = p.parse_args(argv)
    args.tokens, args.warmup, args.share = 8, 1, 1
    return args


main = partial(run_command, parse, run)


if __name__ == "__main__":
    main()
