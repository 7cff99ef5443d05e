"""What choosing itself costs: `python -m benchmarks.selectors`.

Every method reduces 576 tokens to 64 on random signals, the size of LLaVA-1.5's tower, and its
time stands beside the full time to the first token of a stand-in with random weights (CLIP
ViT-L/14 at 336 pixels, 8 decoder layers of width 2048). Signals that cost more than a
slice (columns of attention) are inside the time; of a method with several cuts all are.
Writes benchmarks/results/selectors.json; the last line of the output is the same JSON.

Shapes: N tokens, D features, H heads, d head size, T words.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
from tqdm import tqdm

from mlx_vlm_prune.checkpoints.errors import Parser
from mlx_vlm_prune.decoder import At, through
from mlx_vlm_prune.generate import versions
from mlx_vlm_prune.model import VLM
from mlx_vlm_prune.pruners import METHODS, Pruner, Signals, Stage, plan, resolve
from mlx_vlm_prune.splice import Row, Visual, splice
from mlx_vlm_prune.stream import Clock
from mlx_vlm_prune.towers.between import received

from .shapes import SHAPES, TEXT_TOKENS, prompt
from .timing import spread

RESULTS = Path(__file__).parent / "results"
SHAPE, K, H, ALLOWED = "llava-8", 64, 16, 0.03
TWIG_LAYERS = 3  # its paper's for LLaVA-1.5


def clocked(call: Callable, runs: int) -> dict[str, float]:
    """Milliseconds of a call, the first two left out."""
    times = []
    for _ in range(runs + 2):
        began = time.perf_counter()
        mx.eval(call())
        times.append(1000 * (time.perf_counter() - began))
    return spread(times[2:])


def signals(N: int, grid: tuple[int, int], D: int, wide: int) -> Signals:
    """Random ones of everything a method before the decoder may ask for."""

    def some(*shape: int) -> mx.array:
        return mx.random.normal(shape)

    share_BN = mx.softmax(some(1, N), axis=-1)
    found = Signals(
        some(1, N, D), grid, cls_attention_BN=share_BN, received_attention_BN=share_BN,
        object_attention_BN=share_BN[:, ::-1], cls_query_BHd=some(1, H, D // H),
        queries_BNHd=some(1, N, H, D // H), keys_BNHd=some(1, N, H, D // H),
        pixels_BND=some(1, N, 588), patches_BND=some(1, N, D),
        text_BTD=some(1, TEXT_TOKENS, D), text_real_BT=mx.ones((1, TEXT_TOKENS), dtype=mx.bool_),
    )  # fmt: skip
    mx.eval(list(found.arrays.values()))
    return found


def before_the_decoder(pruner: Pruner, layers: int, seen: Signals) -> Callable:
    """Its work, cuts and streamed signals included."""
    N = seen.x_BND.shape[1]
    steps = [(0, "before", K)]
    if pruner.stage is Stage.ENCODER:
        steps = pruner.ask(pruner.method.cuts, layers, N, K)
    columns = {"received_attention", "object_attention"} & set(pruner.method.needs)
    q_BHSd = seen.queries_BNHd.swapaxes(1, 2)

    def call() -> list[mx.array]:
        done = [received(q_BHSd, q_BHSd, None) for _ in columns]
        left = seen
        for _, _, count in steps:
            kept = pruner(left, count)
            done += kept.parts
            left = left.reduced(kept)
        return done

    return call


def inside_the_decoder(pruner: Pruner, model: VLM) -> Callable:
    """Its first cut, signals included, at the place of the first: later ones see fewer tokens."""
    row, N = prompt(model.config), model.N
    x_ND = mx.random.normal((N, model.config.text.hidden_size))
    told = splice(model.language.embed_tokens, [row], [Visual(x_ND, mx.arange(N))], "keep")
    layers, cache = model.config.text.num_hidden_layers, model.language.make_cache()
    wanted = K if N < 2 * K else max(K, N // 2)
    schedule = pruner.ask(pruner.method.schedule, layers, N, wanted)
    layer = min(schedule)
    before_BLD = through(model.language, range(layer), told, cache)
    mx.eval(before_BLD)

    def call() -> list[mx.array]:
        at = At(model.language, layer, told, before_BLD, cache, pruner.learned)
        return pruner(at.signals(pruner, model.grid), K).parts

    return call


def first_token(model: VLM, row: Row, pixels: mx.array) -> float:
    """Milliseconds of a full forward pass."""
    clock = Clock()
    model([row], pixels, plan("none"), model.N, lap=clock.lap)
    return clock.ttft()["total"]


def main() -> None:
    """The command line."""
    parser = Parser(prog="python -m benchmarks.selectors", description=__doc__.split("\n")[0])
    parser.add_argument("--pruner", action="append", help="repeat for several; default: all")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--save", action="store_true", help="keep as a result")
    args = parser.parse_args()
    mx.random.seed(0)
    config = SHAPES[SHAPE]
    model = VLM(config)
    mx.eval(model.parameters())
    side, row = config.vision.image_size, prompt(config)
    pixels = mx.random.normal((1, side, side, 3))
    full = [first_token(model, row, pixels) for _ in range(5)][2:]
    ttft = statistics.median(full)
    print(f"Full time to the first token: {ttft:.0f} ms; 3 % of it are {ALLOWED * ttft:.0f} ms")
    seen = signals(model.N, model.grid, config.vision.hidden_size, config.text.hidden_size)
    twig = METHODS["twig"].make(config.text, TWIG_LAYERS)
    names = args.pruner or [n for n, m in METHODS.items() if m.prune and n != "none"]
    rows = []
    for name in tqdm(names, file=sys.stderr, leave=False):
        pruner = resolve(name, {"twig": twig})
        decoder = pruner.stage is Stage.DECODER
        layers = config.vision.depth
        call = (
            inside_the_decoder(pruner, model)
            if decoder
            else before_the_decoder(pruner, layers, seen)
        )
        told = clocked(call, args.runs)
        rows.append({"pruner": name, "ms": told, "share": told["median"] / ttft})
        mark = "" if rows[-1]["share"] <= ALLOWED else "  above 3 %"
        print(f"{name:<20}{told['median']:>8.1f} ms{rows[-1]['share']:>8.2%}{mark}", flush=True)
    text = json.dumps({"shape": SHAPE, "N": model.N, "K": K, "ttft_ms": ttft, "runs": args.runs,
                       "versions": versions(), "rows": rows})  # fmt: skip
    if args.save:
        (RESULTS / "selectors.json").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
