"""What pruning inside mlx-vlm's models costs and gains: `python -m benchmarks.hosts`.

They take turns in one process, warm: mlx-vlm left to itself, the same full model through our
path, and ours with a quarter of the visual tokens. A fourth, full with a wait behind the tower,
tells what the prefill alone takes. Timed is everything from prepared pixels and
ids to the first token, vision tower and pruner inside; preparing them is mlx-vlm's own on both
sides. The prefill's gain stands beside what the operation count predicts. Models have random
weights, float32, in the layout of the family. A ratio that spreads by more than it differs from 1
is not told (benchmarks/timing.py). The last line is one JSON object of all figures.

Shapes: L rows of the prompt, N visual tokens.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import import_module, metadata, util
from typing import Any

import mlx.core as mx

from mlx_vlm_prune.checkpoints.config import MiniMindConfig
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.hosts.compatibility import check_pipeline
from mlx_vlm_prune.hosts.families import host_of
from mlx_vlm_prune.hosts.host import generation_stream
from mlx_vlm_prune.hosts.loading import INSTALL
from mlx_vlm_prune.hosts.prepared_inputs import PreparedInputs
from mlx_vlm_prune.hosts.prompt import encode_images_and_text, prune_prompt
from mlx_vlm_prune.machine.clock import Clock
from mlx_vlm_prune.machine.hardware import machine, versions
from mlx_vlm_prune.planning.operations import prefill
from mlx_vlm_prune.pruners import plan
from mlx_vlm_prune.pruners.budget import tokens_for

from .backend_mlx import device
from .command_line import finish, natural, parser, positive
from .timing import NOT_TOLD, Gain, alternate, spread, times

IMAGE, START, END, VIDEO, VOCAB = 4, 5, 6, 7, 32000
WORDS = 30
PATCH = 14


@dataclass(frozen=True)
class Size:
    """A model: the tower's layers and width, the language model's, and patches a side."""

    tower: tuple[int, int]
    language: tuple[int, int]
    side: int
    times: int  # as many runs as are asked for: a toy takes milliseconds


SIZES = {"tiny": Size((2, 64), (2, 64), 8, 10), "mid": Size((12, 512), (8, 1024), 24, 1)}
Laps = dict[str, float]


def _text(size: Size, kind: str, **more: Any) -> dict[str, Any]:
    layers, D = size.language
    return {
        "model_type": kind, "hidden_size": D, "num_hidden_layers": layers,
        "intermediate_size": 3 * D, "num_attention_heads": D // 32, "vocab_size": VOCAB,
        "num_key_value_heads": D // 64, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
        "max_position_embeddings": 4096, **more,
    }  # fmt: skip


def llava(size: Size) -> tuple[Any, PreparedInputs]:
    """CLIP, a projector, Llama; one image."""
    (layers, D), home = size.tower, import_module("mlx_vlm.models.llava")
    vision = home.VisionConfig(
        model_type="clip_vision_model", hidden_size=D, num_hidden_layers=layers,
        intermediate_size=4 * D, num_attention_heads=D // 32, image_size=PATCH * size.side,
        patch_size=PATCH, projection_dim=D,
    )  # fmt: skip
    text = home.TextConfig(**_text(size, "llama"))
    model = home.Model(home.ModelConfig(text, vision, model_type="llava", image_token_index=IMAGE))
    ids = _ids([IMAGE] * size.side**2)
    pixels = mx.random.normal((1, 3, PATCH * size.side, PATCH * size.side))
    return model, PreparedInputs(ids, mx.ones((1, len(ids)), mx.int32), pixels, 1)


def qwen2_5_vl(size: Size) -> tuple[Any, PreparedInputs]:
    """A tower with windows whose merger makes one token of four patches, and M-RoPE; one image."""
    (layers, D), home = size.tower, import_module("mlx_vlm.models.qwen2_5_vl")
    vision = home.VisionConfig(
        depth=layers, hidden_size=D, intermediate_size=4 * D, num_heads=D // 32,
        out_hidden_size=size.language[1], patch_size=PATCH, spatial_merge_size=2,
        temporal_patch_size=2, window_size=112, fullatt_block_indexes=[layers - 1],
    )  # fmt: skip
    rope = {"type": "mrope", "mrope_section": [4, 6, 6]}
    text = home.TextConfig(**_text(size, "qwen2_5_vl", rope_scaling=rope))
    model = home.Model(
        home.ModelConfig(
            text, vision, model_type="qwen2_5_vl", image_token_id=IMAGE, video_token_id=VIDEO,
            vision_start_token_id=START, vision_end_token_id=END, vocab_size=VOCAB,
        )
    )  # fmt: skip
    side = size.side * 2  # as many tokens as LLaVA's
    ids = _ids([START, *[IMAGE] * size.side**2, END])
    pixels = mx.random.normal((side**2, 3 * 2 * PATCH * PATCH))
    extra = {"image_grid_thw": mx.array([[1, side, side]])}
    return model, PreparedInputs(ids, mx.ones((1, len(ids)), mx.int32), pixels, 1, extra)


FAMILIES: dict[str, Callable[[Size], tuple[Any, PreparedInputs]]] = {
    "llava": llava, "qwen2_5_vl": qwen2_5_vl,
}  # fmt: skip


def _ids(image: list[int]) -> list[int]:
    words = [10 + i for i in range(WORDS)]
    return [*words[: WORDS // 2], *image, *words[WORDS // 2 :]]


def first_token(model: Any, arguments: dict[str, Any]) -> int:
    """By mlx-vlm's own loop."""
    from mlx_vlm.generate.ar import generate_step

    rest = dict(arguments)
    ids, pixels, mask = (rest.pop(name) for name in ("input_ids", "pixel_values", "mask"))
    token, _ = next(generate_step(ids, model, pixels, mask, max_tokens=1, temperature=0, **rest))
    return int(token)


def stock(model: Any, inputs: PreparedInputs) -> tuple[Laps, int]:
    """mlx-vlm left to itself."""
    began = time.perf_counter()
    ids = mx.array(inputs.ids)[None]
    told = {"input_ids": ids, "pixel_values": inputs.pixels, "mask": inputs.mask_1L}
    with host_of(model).preserve_state():
        token = first_token(model, {**told, **inputs.extra})
    return {"total": 1000 * (time.perf_counter() - began)}, token


def ours(
    model: Any, inputs: PreparedInputs, spec: str, share: float, in_parts: bool = True
) -> tuple[Laps, int]:
    """The same through our path, which times its parts where it prunes."""
    began, clock = time.perf_counter(), Clock()
    host, pipeline = host_of(model), plan(spec)
    policy = check_pipeline(host, pipeline, None)
    with host.preserve_state():
        with generation_stream(), clock.running() if in_parts else nullcontext():
            views = encode_images_and_text(host, inputs, pipeline)
            K = [tokens_for(view.signals.x_BND.shape[1], share) for view in views]
            prompt = prune_prompt(host, inputs, views, pipeline, K, policy)
        token = first_token(model, prompt.arguments)
    clock.lap("prefill")
    total = 1000 * (time.perf_counter() - began)
    return {**(clock.ms if in_parts else {}), "total": total}, token


def predicted(size: Size, share: float) -> float:
    """How many times as fast the prefill may be, by the count of multiply-adds."""
    layers, D = size.language
    # A Llama and a Qwen2 of these sizes take as many.
    like = MiniMindConfig(D, 3 * D, layers, D // 32, D // 64, VOCAB)
    whole, less = (
        prefill(like, [WORDS + int(size.side**2 * kept)] * layers) for kept in (1.0, share)
    )
    return whole / less


def measure(family: str, name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One model: the times of all, what our path costs, and what pruning gains."""
    mx.random.seed(0)
    model, inputs = FAMILIES[family](SIZES[name])
    mx.eval(model.parameters(), inputs.pixels)
    full = partial(ours, model, inputs, "none", 1.0)
    three = [partial(full, in_parts=False), full,
             partial(ours, model, inputs, args.pruner, args.keep_ratio)]  # fmt: skip
    runs = args.runs * SIZES[name].times
    turns = (runs, args.warmup, len(three), f"{family}, {name}")
    times: dict[str, list[Laps]] = {who: [] for who in ("stock", "full", "parts", "pruned")}
    for i, (ms, token), (before, expected) in alternate(
        partial(stock, model, inputs), three, *turns
    ):
        if i == 0:
            times["stock"].append(before)
        if i < 2 and token != expected:
            raise UserError(f"{family}, {name}: unpruned, our path says another first token")
        times[("full", "parts", "pruned")[i]].append(ms)
    gain = Gain.of(*([one["prefill"] for one in times[who]] for who in ("parts", "pruned")))
    return {
        "family": family, "size": name, "tokens": SIZES[name].side ** 2, "pruner": args.pruner,
        "keep_ratio": args.keep_ratio,
        "ms": {who: {part: spread([one[part] for one in laps]) for part in laps[0]}
               for who, laps in times.items()},
        "stock_by_ours": _beside(times, "full"),
        "prefill": gain.report(predicted(SIZES[name], args.keep_ratio)),
        "first_token": _beside(times, "pruned"), "runs": runs,
    }  # fmt: skip


def _beside(times: dict[str, list[Laps]], who: str) -> dict[str, float]:
    """How many times as long mlx-vlm takes to the first token, run by run."""
    pairs = zip(times["stock"], times[who], strict=True)
    return spread([left["total"] / ours["total"] for left, ours in pairs])


def show(row: dict[str, Any]) -> None:
    """A few lines."""
    whole = {who: told["total"]["median"] for who, told in row["ms"].items()}
    cost, gain, first = row["stock_by_ours"], row["prefill"], row["first_token"]
    told = times(gain["realised"], "not told")
    print(
        f"{row['family']}, {row['size']}, {row['tokens']} visual tokens, first token in ms: "
        f"mlx-vlm {whole['stock']:.1f}, ours full {whole['full']:.1f}, "
        f"{row['pruner']} {whole['pruned']:.1f}\n"
        f"  unpruned, mlx-vlm ÷ ours: {cost['median']:.3f} ({cost['p10']:.3f} to {cost['p90']:.3f})"
        f"\n  prefill at {row['keep_ratio']:.0%}: {told} of {gain['predicted']:.2f}x predicted; "
        f"first token {first['median']:.2f}x ({first['p10']:.2f} to {first['p90']:.2f})",
        flush=True,
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Every family at every size asked for."""
    rows = []
    for family in args.family or FAMILIES:
        for name in args.size or SIZES:
            rows.append(measure(family, name, args))
            show(rows[-1])
    print(f"Medians of {args.runs} runs, of toys ten times as many.")
    print(f"{NOT_TOLD[0].upper()}{NOT_TOLD[1:]}.")
    return {
        "benchmark": "hosts", "device": device(), "runs": args.runs, "machine": machine(),
        "versions": {**versions(), "mlx-vlm": metadata.version("mlx-vlm")}, "rows": rows,
    }  # fmt: skip


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = parser("hosts", __doc__, names_result=True)
    add = p.add_argument
    add("--family", action="append", choices=FAMILIES, help="repeat (default: all)")
    add("--size", action="append", choices=SIZES, help="repeat (default: all)")
    add("--pruner", default="received_attention", help="(default: received_attention)")
    add("--keep-ratio", type=float, default=0.25, help="(default: 0.25)")
    add("--runs", type=positive, default=20, help="measured runs of each (default: 20)")
    add("--warmup", type=natural, default=2, help="runs before them (default: 2)")
    args = p.parse_args(argv)
    if not 0 < args.keep_ratio <= 1:
        raise UserError(f"--keep-ratio is {args.keep_ratio:g}; it must be above 0 and up to 1")
    if util.find_spec("mlx_vlm") is None:
        raise UserError(f"mlx-vlm cannot be found; {INSTALL}")
    return args


main = partial(finish, parse, run)


if __name__ == "__main__":
    main()
