"""How many kernels a GPU is asked to launch for a choice: `python -m benchmarks.launches`.

Counted, not timed: a method's graph is built as on a GPU (choices in float32, elementwise parts
compiled) and its operations are added up, on any machine. Signals of a tower that are more than a
slice (columns of attention) and all cuts within its 24 layers are included; the tower itself and
the kept tokens' way into the language model are not. The last line is JSON.

An operation is one launch, but: a concatenation copies each of its inputs, a padding fills and
copies, and views launch nothing. What MLX decides later (copies of strided inputs, sorts of several
passes, reductions in two steps) is not counted.

Shapes: B images, N tokens, S with CLS, H heads, d head size, D features.
"""

import argparse
import io
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import mlx.core as mx

from mlx_vlm_prune.checkpoints.command_line import whole_number
from mlx_vlm_prune.models.towers.signals import Cut, TowerPass
from mlx_vlm_prune.pruners import METHODS, Pruner, Stage, resolve
from mlx_vlm_prune.pruners.numerics import precision

from .command_line import parser, run_command
from .selectors import random_signals

DEPTH, H, D = 24, 16, 1024  # of LLaVA-1.5's tower
VIEWS = {
    "AsStrided", "Broadcast", "BroadcastAxes", "Depends", "ExpandDims", "Flatten", "Reshape",
    "Slice", "Split", "Squeeze", "StopGradient", "Transpose", "Unflatten", "View",
}  # fmt: skip
ABLE = [
    name
    for name, method in METHODS.items()
    if method.prune and not method.learned and name not in ("none", "twig")
]


def launches(roots: Sequence[mx.array]) -> Counter[str]:
    """The launches of the graph of some arrays, by operation."""
    dot, counts = io.StringIO(), Counter[str]()
    mx.export_to_dot(dot, *roots)
    inputs = Counter(re.findall(r"-> (\d+)$", dot.getvalue(), re.M))
    # A compiled function's calls share their operations, so that a node may be there repeatedly.
    for node, name in re.findall(r"{ (\d+) \[label =\"([^\"]+)\"", dot.getvalue()):
        if name.split()[0] not in VIEWS:
            counts[name] += inputs[node] if name == "Concatenate" else 1 + (name == "Pad")
    return counts


@contextmanager
def counting_returns(counts: Counter[str]) -> Iterator[None]:
    """Inside the block, a return to the host counts what it computes."""
    evaluate = mx.eval

    def count(*arrays: Any) -> None:
        counts.update(launches([array for part in arrays for array in part]))
        evaluate(*arrays)

    mx.eval = count
    try:
        yield
    finally:
        mx.eval = evaluate


def of_method(pruner: Pruner, rows: int, K: int, *, fuse: bool = True) -> Counter[str]:
    """The launches of a choice of K among rows x rows tokens, by `fused` functions or not."""
    N, counts = rows * rows, Counter[str]()
    signals = random_signals(N, (rows, rows), D)
    is_inside = pruner.stage is Stage.DECODER  # of the language model, which computes the signals
    if is_inside:
        share_BN, text_BTD = signals.cls_attention_BN, signals.text_BTD
        signals = signals.replace(
            before_BND=signals.x_BND[:, ::-1], normed_BND=signals.x_BND, keys_BND=signals.x_BND,
            next_keys_BND=signals.x_BND, text_keys_BTD=text_BTD, last_attention_BN=share_BN,
            next_attention_BN=share_BN, mean_attention_BN=share_BN,
            entrance_BND=signals.x_BND, cls_rank_BN=share_BN, held_values_BNHd=signals.values_BNHd,
            text_values_BTHd=text_BTD.reshape(1, -1, H, D // H),
            rotary_cosine_BN=share_BN, rotary_sine_BN=share_BN[:, ::-1],
            text_share_BT=mx.softmax(text_BTD[..., 0], axis=-1),
            text_attention_BTN=mx.broadcast_to(share_BN[:, None], (*text_BTD.shape[:2], N)),
        )  # fmt: skip
        mx.eval(list(signals.arrays.values()))
    wanted = {} if is_inside else pruner.signal_layers(DEPTH)
    steps = pruner.call(pruner.method.cuts, DEPTH, N, K) if pruner.stage is Stage.ENCODER else []
    cuts = [Cut(layer, place, left, pruner) for layer, place, left in steps]
    x_BSD = mx.random.normal((1, 1 + N, D))
    mx.eval(x_BSD)
    with precision("float32", fuse=fuse), counting_returns(counts):
        tower = TowerPass(signals, wanted, DEPTH, cuts)
        for layer in range(DEPTH):
            q_BHSd = x_BSD.reshape(1, x_BSD.shape[1], H, D // H).swapaxes(1, 2)
            x_BSD = tower.cut(x_BSD, layer, "before")
            keys = {}
            if layer in tower.want.values() or cuts:
                keys = tower.read(layer, q_BHSd, q_BHSd, v_BHSd=q_BHSd)
            x_BSD = tower.cut(x_BSD, layer, "middle", keys)
        encoded = tower.end(x_BSD)
        kept, tokens_BKD = encoded.kept, encoded.signals.x_BND
        if kept is None:
            kept = pruner(encoded.signals, K)
            tokens_BKD = kept.tokens(tokens_BKD)
        assert kept.is_finite is not None
        counts.update(launches([tokens_BKD, *kept.arrays, kept.is_finite]))
    return counts


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Count and print each method; the result."""
    print(f"{'':<20}" + "".join(f"{rows * rows:>8}" for rows in args.rows))
    table = []
    for pruner in args.pruner:
        counts = [of_method(pruner, rows, rows * rows // 4) for rows in args.rows]
        print(f"{pruner.spec:<20}" + "".join(f"{sum(n.values()):>8}" for n in counts), flush=True)
        if args.operations:
            print("    " + ", ".join(f"{op} {n}" for op, n in counts[-1].most_common()))
        table.append({"pruner": pruner.spec, "launches": [sum(n.values()) for n in counts]})
    return {"tokens": [rows * rows for rows in args.rows], "rows": table}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = parser("launches", __doc__)
    p.add_argument(
        "--pruner", action="append", help="a method; repeat (default: all without weights)"
    )
    p.add_argument(
        "--rows",
        type=partial(whole_number, 2),
        nargs="+",
        default=[24, 48],
        help="rows of the grid",
    )
    p.add_argument("--operations", action="store_true", help="print what is launched too")
    args = p.parse_args(argv)
    args.pruner = [resolve(name) for name in args.pruner or ABLE]  # refused before any is counted
    return args


main = partial(run_command, parse, run)


if __name__ == "__main__":
    main()
