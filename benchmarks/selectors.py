"""What choosing itself costs: `python -m benchmarks.selectors`.

Every method reduces 576 tokens to 64 on random signals of the size of LLaVA-1.5's tower. Its time
is compared with the unpruned time to first token of a model with random weights (CLIP ViT-L/14 at
336 pixels, 8 decoder layers of width 2048). The time includes signals that cost more than a slice
(columns of attention), and all cuts of a method before the decoder. `--save` writes
benchmarks/results/selectors.json; the last line is the same JSON.

Shapes: N tokens, D features, H heads, d head size, T words.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
from tqdm import tqdm

from mlx_vlm_prune.checkpoints.command_line import suggestion
from mlx_vlm_prune.checkpoints.config import MiniMindConfig
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.inputs.prompt import Prompt
from mlx_vlm_prune.machine.clock import Clock
from mlx_vlm_prune.machine.hardware import versions
from mlx_vlm_prune.machine.timing import spread
from mlx_vlm_prune.models.decoder import Cuts, Decoder, LayerInput
from mlx_vlm_prune.models.language.twig import Twig
from mlx_vlm_prune.models.layers import TwigReader, run_layers
from mlx_vlm_prune.models.splice import ImageSlots, splice
from mlx_vlm_prune.models.towers.signals import received_attention
from mlx_vlm_prune.models.vlm import VLM
from mlx_vlm_prune.pruners import METHODS, Pruner, Signals, Stage, plan, resolve

from .command_line import parser, positive, run_command
from .model_shapes import SHAPES, TEXT_TOKENS, prompt

SHAPE, K, H, ALLOWED = "llava-8", 64, 16, 0.03
TWIG_LAYERS = 3  # as in TwigVLM's paper for LLaVA-1.5


def time_calls(call: Callable, runs: int) -> dict[str, float]:
    """Milliseconds of a call: median and deciles of `runs` after two warm-up calls."""
    times = []
    for _ in range(runs + 2):
        began = time.perf_counter()
        mx.eval(call())
        times.append(1000 * (time.perf_counter() - began))
    return spread(times[2:])


def random_signals(N: int, grid: tuple[int, int], D: int) -> Signals:
    """Random signals, all that a method before the decoder may need."""

    def normal(*shape: int) -> mx.array:
        return mx.random.normal(shape)

    share_BN = mx.softmax(normal(1, N), axis=-1)
    signals = Signals(
        normal(1, N, D), grid, cls_attention_BN=share_BN, received_attention_BN=share_BN,
        object_attention_BN=share_BN[:, ::-1], cls_query_BHd=normal(1, H, D // H),
        cls_key_BHd=normal(1, H, D // H), features_BND=normal(1, N, D),
        queries_BNHd=normal(1, N, H, D // H), keys_BNHd=normal(1, N, H, D // H),
        values_BNHd=normal(1, N, H, D // H), cls_value_BHd=normal(1, H, D // H),
        sensitivity_BN=share_BN, layer_attention_BN=share_BN, cls_row_BN=share_BN,
        grey_BNP=normal(1, N, 196),
        pixels_BND=normal(1, N, 588), patches_BND=normal(1, N, D), before_BND=normal(1, N, D),
        text_BTD=normal(1, TEXT_TOKENS, D), text_real_BT=mx.ones((1, TEXT_TOKENS), dtype=mx.bool_),
    )  # fmt: skip
    mx.eval(list(signals.arrays.values()))
    return signals


def before_decoder_call(pruner: Pruner, layers: int, signals: Signals) -> Callable:
    """All cuts of a method in or after a tower of `layers`, attention columns included."""
    N = signals.x_BND.shape[1]
    steps = [(0, "before", K)]
    if pruner.stage is Stage.ENCODER:
        steps = pruner.call(pruner.method.cuts, layers, N, K)
    columns = {"received_attention", "object_attention"} & set(pruner.method.needs)
    q_BHSd = signals.queries_BNHd.swapaxes(1, 2)

    def call() -> list[mx.array]:
        outputs = [received_attention(q_BHSd, q_BHSd, None) for _ in columns]
        remaining = signals
        for _, _, count in steps:
            reduction = pruner(remaining, count)
            outputs += reduction.arrays
            remaining = remaining.reduced(reduction)
        return outputs

    return call


def inside_decoder_call(pruner: Pruner, model: VLM) -> Callable:
    """The first cut of a method in the decoder, signals included; later cuts see fewer tokens."""
    row, N = prompt(model.config), model.N
    x_ND = mx.random.normal((N, model.config.text.hidden_size))
    image = ImageSlots(x_ND, mx.arange(N), rank_K=mx.arange(N) / N)
    spliced = splice(model.language.embed_tokens, [row], [image], "keep")
    layers, cache = model.config.text.num_hidden_layers, model.language.make_cache()
    target = K if N < 2 * K else max(K, N // 2)
    schedule = pruner.call(pruner.method.schedule, layers, N, target)
    layer = min(schedule)
    before_BLD = run_layers(model.language, range(layer), spliced, cache)
    mx.eval(before_BLD)

    def call() -> list[mx.array]:
        twig = TwigReader(pruner.weights) if pruner.weights else None
        decoder = Decoder(model.language, cache, Cuts(pruner, twig=twig))
        layer_input = LayerInput(decoder, layer, spliced, before_BLD, [0], model.grid)
        return pruner(layer_input.signals(pruner), K).arrays

    return call


def first_token(model: VLM, row: Prompt, pixels: mx.array) -> float:
    """Milliseconds of an unpruned prefill, from pixels on."""
    with Clock().running() as clock:
        model([row], pixels, plan("none"), model.N)
    return clock.ttft()["total"]


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and print each method; the result."""
    mx.random.seed(0)
    config = SHAPES[SHAPE]
    assert isinstance(config.text, MiniMindConfig)
    twig = Twig(config.text, TWIG_LAYERS, 1)
    pruners = {name: resolve(name, {"twig": twig}) for name in args.pruner}
    model = VLM(config)
    mx.eval(model.parameters())
    side, row = config.vision.image_size, prompt(config)
    pixels = mx.random.normal((1, side, side, 3))
    full = [first_token(model, row, pixels) for _ in range(5)][2:]
    ttft = statistics.median(full)
    print(f"Full time to the first token: {ttft:.0f} ms; 3 % of it are {ALLOWED * ttft:.0f} ms")
    signals = random_signals(model.N, model.grid, config.vision.hidden_size)
    rows = []
    for name, pruner in tqdm(pruners.items(), file=sys.stderr, leave=False):
        if pruner.stage is Stage.DECODER:
            call = inside_decoder_call(pruner, model)
        else:
            call = before_decoder_call(pruner, config.vision.depth, signals)
        ms = time_calls(call, args.runs)
        rows.append({"pruner": name, "ms": ms, "share": ms["median"] / ttft})
        mark = "" if rows[-1]["share"] <= ALLOWED else "  above 3 %"
        print(f"{name:<20}{ms['median']:>8.1f} ms{rows[-1]['share']:>8.2%}{mark}", flush=True)
    return {
        "shape": SHAPE, "N": model.N, "K": K, "ttft_ms": ttft, "runs": args.runs,
        "versions": versions(), "rows": rows,
    }  # fmt: skip


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = parser("selectors", __doc__)
    p.add_argument("--pruner", action="append", help="a method; repeat (default: all)")
    p.add_argument("--runs", type=positive, default=20, help="measured runs of each method")
    args = p.parse_args(argv)
    able = [name for name, method in METHODS.items() if method.prune and name != "none"]
    args.pruner = args.pruner or able
    for name in args.pruner:  # a wrong one is refused before any is measured
        if name.split(":")[0] not in able:
            raise UserError(f"no method that chooses is called {name!r}; {suggestion(name, able)}")
    return args


main = partial(run_command, parse, run)


if __name__ == "__main__":
    main()
