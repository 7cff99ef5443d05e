"""How much sooner the first token comes: `python -m benchmarks.speed`.

Full size, random weights: ViT-B/16 and a MiniMind2 language model, 196 visual tokens.
Full and pruned run in alternation in one process, warm; the tower and the pruner are
inside the time. Before measuring it prints what the operation count allows; the last
line of its output is one JSON object of the same figures.
"""

import argparse
import json
import platform
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
from tqdm import tqdm

from mlx_vlm_prune.generate import versions
from mlx_vlm_prune.language.minimind import MiniMindConfig
from mlx_vlm_prune.model import VLM, VLMConfig
from mlx_vlm_prune.pruners import Pipeline, Stage, plan
from mlx_vlm_prune.stream import Clock
from mlx_vlm_prune.towers.clip import CLIPConfig

from . import operations

RESULTS = Path(__file__).parent / "results"
TEXT_TOKENS = 30  # MiniMind-V's own prompt around the image
BASE = MiniMindConfig(hidden_size=768, intermediate_size=2048, num_hidden_layers=16)
SHAPES = {
    "minimind2-v-small": VLMConfig(),
    "minimind2-v": VLMConfig(text=BASE),
    # LLaVA-1.5's tower, CLIP ViT-L/14 at 336 pixels, and 8 layers as wide as a 1 B model's.
    "llava-8": VLMConfig(
        CLIPConfig(1024, 4096, 24, 16, 336, 14), MiniMindConfig(2048, 5504, 8, 16, 16, 32000)
    ),
}
DEFAULT = ("random", "uniform", "avgpool", "downsample", "tome", "cls_attention", "divprune")
PARTS = ("vision", "pruner", "prefill", "total")


@dataclass(frozen=True)
class Row:
    """A prompt of random ids with one image in the middle."""

    ids: list[int]
    runs: list[tuple[int, int]]


def prompt(config: VLMConfig) -> Row:
    N = config.vision.grid[0] * config.vision.grid[1]
    text = [5 + i for i in range(TEXT_TOKENS)]
    half = TEXT_TOKENS // 2
    return Row(text[:half] + [config.image_token_id] * N + text[half:], [(half, N)])


def once(model: VLM, row: Row, pixels: mx.array, pruner: Pipeline, K: int) -> dict[str, float]:
    """Milliseconds of each part of one forward pass up to the first token."""
    clock = Clock()
    model([row], pixels, pruner, K, lap=clock.lap)
    return clock.ttft()


def spread(times: list[float]) -> dict[str, float]:
    deciles = statistics.quantiles(times, n=10)
    return {"median": statistics.median(times), "p10": deciles[0], "p90": deciles[-1]}


def work(config: VLMConfig, pipeline: Pipeline, K: int) -> int:
    """Multiply-adds of projector and language model."""
    N, layers = config.vision.grid[0] * config.vision.grid[1], config.text.num_hidden_layers
    before = [k for k, s in zip(pipeline.budgets(N, K), pipeline.steps, strict=True)
              if s.stage is not Stage.DECODER]  # fmt: skip
    left = before[-1] if before else N
    held = [left] * layers
    if pipeline.decoder and left > K:
        step = pipeline.decoder
        for layer, rows in step.ask(step.method.schedule, layers, left, K).items():
            held[layer:] = [rows] * (layers - layer)
    projected = N if pipeline.at(Stage.PROJECTED) else left
    return operations.prefill(config, TEXT_TOKENS, held, projected)


def measure(config: VLMConfig, names: list[str], K: int, runs: int) -> list[dict]:
    """One row of figures per method, each measured beside full in alternation."""
    mx.random.seed(0)
    model = VLM(config)
    mx.eval(model.parameters())
    row = prompt(config)
    side = config.vision.image_size
    pixels = mx.random.normal((1, side, side, 3))
    N, full, rows = model.N, plan("none"), []
    for name in names:
        pruner = plan(name)
        gain = work(config, full, N) / work(config, pruner, K)
        laps: dict[str, list[dict[str, float]]] = {"full": [], "pruned": []}
        for i in tqdm(range(runs + 2), desc=name, leave=False, file=sys.stderr):
            seen = once(model, row, pixels, full, N), once(model, row, pixels, pruner, K)
            if i >= 2:  # the first two are warm-up
                laps["full"].append(seen[0])
                laps["pruned"].append(seen[1])
        rows.append({"pruner": name, "tokens": N, "kept": K, **figures(laps, gain)})
    return rows


def figures(laps: dict[str, list[dict[str, float]]], gain: float) -> dict:
    """What the laps come to, beside the gain of the prefill that was predicted."""
    pairs = zip(laps["pruned"], laps["full"], strict=True)
    realised = _ratio(laps, "prefill")
    return {
        "ms": {
            kind: {part: spread([lap[part] for lap in laps[kind]]) for part in PARTS}
            for kind in laps
        },
        "prefill_gain": realised,
        "prefill_gain_predicted": gain,
        "realised": realised / gain,
        "ttft_gain": _ratio(laps, "total"),
        "pruner_share": statistics.median(p["pruner"] / f["total"] for p, f in pairs),
    }


def _ratio(laps: dict[str, list[dict[str, float]]], part: str) -> float:
    """Median over the runs of full ÷ pruned, pair by pair: a drifting machine cancels out."""
    pairs = zip(laps["full"], laps["pruned"], strict=True)
    return statistics.median(f[part] / p[part] for f, p in pairs)


def predict(config: VLMConfig, K: int) -> None:
    """Print what the operation count allows."""
    N = config.vision.grid[0] * config.vision.grid[1]
    full, kept = (work(config, plan("uniform"), left) for left in (N, K))
    tower = operations.tower(config)
    print(f"{N} -> {K} visual tokens before the decoder, {TEXT_TOKENS} of text, float32,", end=" ")
    print(mx.default_device())
    print(
        f"Ceiling by operation count: prefill {full / kept:.2f} x, "
        f"time to first token {(tower + full) / (tower + kept):.2f} x"
    )
    print(
        f"(G multiply-adds: tower {tower / 1e9:.2f}, prefill {full / 1e9:.2f} -> {kept / 1e9:.2f})"
    )


def show(rows: list[dict]) -> None:
    """Print the measured rows; times are medians."""
    print(f"{'pruner':<15}{'prefill ms':>20}{'gain':>7}{'realised':>10}", end="")
    print(f"{'TTFT ms':>20}{'gain':>7}{'pruner':>9}")
    for r in rows:
        full, pruned = r["ms"]["full"], r["ms"]["pruned"]
        prefill, total = (
            f"{full[part]['median']:.1f} -> {pruned[part]['median']:.1f}"
            for part in ("prefill", "total")
        )
        print(
            f"{r['pruner']:<15}{prefill:>20}{r['prefill_gain']:>6.2f}x{r['realised']:>10.0%}",
            end="",
        )
        print(f"{total:>20}{r['ttft_gain']:>6.2f}x{r['pruner_share']:>9.1%}")
    print("realised: measured ÷ predicted gain of the prefill; pruner: its share of the full TTFT")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="minimind2-v-small")
    parser.add_argument("--pruner", action="append", help="repeat for several")
    parser.add_argument("--keep-ratio", type=float, default=0.25)
    parser.add_argument("--keep-tokens", type=int, help="instead of a ratio")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--save", metavar="NAME", help="keep as benchmarks/results/NAME.json")
    args = parser.parse_args()
    config = SHAPES[args.shape]
    N = config.vision.grid[0] * config.vision.grid[1]
    K = args.keep_tokens or max(1, int(N * args.keep_ratio))
    predict(config, K)
    rows = measure(config, args.pruner or list(DEFAULT), K, args.runs)
    show(rows)
    about = {
        "shape": args.shape,
        "runs": args.runs,
        "machine": platform.machine(),
        "device": str(mx.default_device()),
        "versions": versions(),
    }
    told = json.dumps({**about, "rows": rows})
    if args.save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{args.save}.json").write_text(told + "\n", encoding="utf-8")
    print(told)


if __name__ == "__main__":
    main()
