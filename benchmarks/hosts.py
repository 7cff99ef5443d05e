"""What pruning inside mlx-vlm's models costs and gains: `python -m benchmarks.hosts`.

Four runs alternate in one process after a warm-up: mlx-vlm alone (`stock`), the same model unpruned
through our path (`full`), the same with a lap after each part, which times the prefill (`parts`),
and ours with a quarter of the visual tokens (`pruned`). Timed is everything from preprocessed
pixels and ids to the first token, with vision tower and pruner; preprocessing is mlx-vlm's on both
sides. The prefill's gain is reported with what the operation count predicts. Models have random
float32 weights in their family's layout. A ratio is reported only if it spreads by no more than it
differs from 1 (mlx_vlm_prune/machine/timing.py). The last line is one JSON object of all figures.
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
from mlx_vlm_prune.inputs.budget import tokens_for
from mlx_vlm_prune.machine.clock import Clock
from mlx_vlm_prune.machine.hardware import describe_machine, versions
from mlx_vlm_prune.machine.timing import NOT_REPORTED, Gain, alternate, spread, times_text
from mlx_vlm_prune.planning.operations import prefill
from mlx_vlm_prune.pruners import plan

from .backend_mlx import device
from .command_line import natural, parser, positive, run_command

IMAGE, START, END, VIDEO, VOCAB = 4, 5, 6, 7, 32000
TEXT_TOKENS = 30
PATCH = 14


@dataclass(frozen=True)
class Size:
    """A model: layers and width of tower and language model, and tokens per side of its image."""

    tower: tuple[int, int]
    language: tuple[int, int]
    side: int
    runs: int  # for each run of --runs: a tiny model takes milliseconds


SIZES = {"tiny": Size((2, 64), (2, 64), 8, 10), "mid": Size((12, 512), (8, 1024), 24, 1)}
Laps = dict[str, float]


def _text_config(size: Size, model_type: str, **extra: Any) -> dict[str, Any]:
    layers, D = size.language
    return {
        "model_type": model_type, "hidden_size": D, "num_hidden_layers": layers,
        "intermediate_size": 3 * D, "num_attention_heads": D // 32, "vocab_size": VOCAB,
        "num_key_value_heads": D // 64, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
        "max_position_embeddings": 4096, **extra,
    }  # fmt: skip


def llava(size: Size) -> tuple[Any, PreparedInputs]:
    """CLIP, a projector, Llama; one image."""
    (layers, D), module = size.tower, import_module("mlx_vlm.models.llava")
    vision = module.VisionConfig(
        model_type="clip_vision_model", hidden_size=D, num_hidden_layers=layers,
        intermediate_size=4 * D, num_attention_heads=D // 32, image_size=PATCH * size.side,
        patch_size=PATCH, projection_dim=D,
    )  # fmt: skip
    text = module.TextConfig(**_text_config(size, "llama"))
    model = module.Model(
        module.ModelConfig(text, vision, model_type="llava", image_token_index=IMAGE)
    )
    ids = _ids([IMAGE] * size.side**2)
    pixels = mx.random.normal((1, 3, PATCH * size.side, PATCH * size.side))
    return model, PreparedInputs(ids, mx.ones((1, len(ids)), mx.int32), pixels, 1)


def qwen2_5_vl_config(size: Size) -> dict[str, Any]:
    """The config.json of a model of this size."""
    layers, D = size.tower
    vision = {
        "depth": layers, "hidden_size": D, "intermediate_size": 4 * D, "num_heads": D // 32,
        "out_hidden_size": size.language[1], "patch_size": PATCH, "spatial_merge_size": 2,
        "temporal_patch_size": 2, "window_size": 112, "fullatt_block_indexes": [layers - 1],
    }  # fmt: skip
    rope = {"type": "mrope", "mrope_section": [4, 6, 6]}
    ids = {
        "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START,
        "vision_end_token_id": END,
    }  # fmt: skip
    text = _text_config(size, "qwen2_5_vl", rope_scaling=rope)
    return {**text, **ids, "vision_config": vision}


def qwen2_5_vl_model(size: Size) -> Any:
    """mlx-vlm's model, its weights random."""
    module, config = import_module("mlx_vlm.models.qwen2_5_vl"), qwen2_5_vl_config(size)
    vision = module.VisionConfig(**config.pop("vision_config"))
    ids = {name: value for name, value in config.items() if name.endswith("_token_id")}
    text = module.TextConfig(**{n: value for n, value in config.items() if n not in ids})
    more = {"model_type": "qwen2_5_vl", "vocab_size": VOCAB}
    return module.Model(module.ModelConfig(text, vision, **more, **ids))


def qwen2_5_vl(size: Size) -> tuple[Any, PreparedInputs]:
    """A tower with windowed attention that merges 2 x 2 patches, and M-RoPE; one image."""
    model = qwen2_5_vl_model(size)
    side = size.side * 2  # as many tokens as LLaVA's
    ids = _ids([START, *[IMAGE] * size.side**2, END])
    pixels = mx.random.normal((side**2, 3 * 2 * PATCH * PATCH))
    extra = {"image_grid_thw": mx.array([[1, side, side]])}
    return model, PreparedInputs(ids, mx.ones((1, len(ids)), mx.int32), pixels, 1, extra)


FAMILIES: dict[str, Callable[[Size], tuple[Any, PreparedInputs]]] = {
    "llava": llava, "qwen2_5_vl": qwen2_5_vl,
}  # fmt: skip


def _ids(image: list[int]) -> list[int]:
    text = [10 + i for i in range(TEXT_TOKENS)]
    return [*text[: TEXT_TOKENS // 2], *image, *text[TEXT_TOKENS // 2 :]]


def first_token(model: Any, arguments: dict[str, Any]) -> int:
    """The first token, by mlx-vlm's `generate_step`."""
    from mlx_vlm.generate.ar import generate_step

    rest = dict(arguments)
    ids, pixels, mask = (rest.pop(name) for name in ("input_ids", "pixel_values", "mask"))
    token, _ = next(generate_step(ids, model, pixels, mask, max_tokens=1, temperature=0, **rest))
    return int(token)


def run_stock(model: Any, inputs: PreparedInputs) -> tuple[Laps, int]:
    """The milliseconds and the first token of mlx-vlm alone."""
    began = time.perf_counter()
    ids = mx.array(inputs.ids)[None]
    arguments = {"input_ids": ids, "pixel_values": inputs.pixels, "mask": inputs.mask_1L}
    with host_of(model).preserve_state():
        token = first_token(model, {**arguments, **inputs.extra})
    return {"total": 1000 * (time.perf_counter() - began)}, token


def run_ours(
    model: Any, inputs: PreparedInputs, spec: str, share: float, in_parts: bool = True
) -> tuple[Laps, int]:
    """The milliseconds and first token of our path; `in_parts` ends a lap after each part."""
    began, clock = time.perf_counter(), Clock()
    host, pipeline = host_of(model), plan(spec)
    policy = check_pipeline(host, pipeline, None)
    with host.preserve_state():
        with generation_stream(), clock.running() if in_parts else nullcontext():
            views = encode_images_and_text(host, inputs, pipeline)
            K = [tokens_for(view.signals.x_BND.shape[1], share) for view in views]
            prompt = prune_prompt(host, inputs, views, pipeline, K, policy)
        token = first_token(model, prompt.arguments)
    clock.end_part("prefill")
    total = 1000 * (time.perf_counter() - began)
    return {**(clock.ms if in_parts else {}), "total": total}, token


def predicted_gain(size: Size, share: float) -> float:
    """How many times as fast the prefill is by the count of multiply-adds."""
    layers, D = size.language
    # A Llama and a Qwen2 of these sizes have the same count.
    config = MiniMindConfig(D, 3 * D, layers, D // 32, D // 64, VOCAB)
    full, pruned = (
        prefill(config, [TEXT_TOKENS + int(size.side**2 * kept)] * layers) for kept in (1.0, share)
    )
    return full / pruned


def measure(family: str, size: str, args: argparse.Namespace) -> dict[str, Any]:
    """The row of one model: all times, what our path costs, and what pruning gains."""
    mx.random.seed(0)
    model, inputs = FAMILIES[family](SIZES[size])
    mx.eval(model.parameters(), inputs.pixels)
    full = partial(run_ours, model, inputs, "none", 1.0)
    our_runs = [partial(full, in_parts=False), full,
                partial(run_ours, model, inputs, args.pruner, args.keep_ratio)]  # fmt: skip
    run_count = args.runs * SIZES[size].runs
    turns = (run_count, args.warmup, len(our_runs), f"{family}, {size}")
    times: dict[str, list[Laps]] = {name: [] for name in ("stock", "full", "parts", "pruned")}
    for i, (ms, token), (stock_ms, expected) in alternate(
        partial(run_stock, model, inputs), our_runs, *turns
    ):
        if i == 0:
            times["stock"].append(stock_ms)
        if i < 2 and token != expected:
            raise UserError(f"{family}, {size}: unpruned, our path says another first token")
        times[("full", "parts", "pruned")[i]].append(ms)
    gain = Gain.of(*([laps["prefill"] for laps in times[kind]] for kind in ("parts", "pruned")))
    return {
        "family": family, "size": size, "tokens": SIZES[size].side ** 2, "pruner": args.pruner,
        "keep_ratio": args.keep_ratio,
        "ms": {kind: {part: spread([laps[part] for laps in runs]) for part in runs[0]}
               for kind, runs in times.items()},
        "stock_by_ours": _stock_ratio(times, "full"),
        "prefill": gain.report(predicted_gain(SIZES[size], args.keep_ratio)),
        "first_token": _stock_ratio(times, "pruned"), "runs": run_count,
    }  # fmt: skip


def _stock_ratio(times: dict[str, list[Laps]], kind: str) -> dict[str, float]:
    """The time to first token of mlx-vlm alone by that of our runs, run by run."""
    pairs = zip(times["stock"], times[kind], strict=True)
    return spread([stock["total"] / ours["total"] for stock, ours in pairs])


def print_row(row: dict[str, Any]) -> None:
    """Print the figures of a model."""
    total = {kind: parts["total"]["median"] for kind, parts in row["ms"].items()}
    cost, gain, first = row["stock_by_ours"], row["prefill"], row["first_token"]
    realised = times_text(gain["realised"], "not told")
    print(
        f"{row['family']}, {row['size']}, {row['tokens']} visual tokens, first token in ms: "
        f"mlx-vlm {total['stock']:.1f}, ours full {total['full']:.1f}, "
        f"{row['pruner']} {total['pruned']:.1f}\n"
        f"  unpruned, mlx-vlm ÷ ours: {cost['median']:.3f} ({cost['p10']:.3f} to {cost['p90']:.3f})"
        f"\n  prefill at {row['keep_ratio']:.0%}: {realised} of {gain['predicted']:.2f}x "
        f"predicted; first token {first['median']:.2f}x ({first['p10']:.2f} to {first['p90']:.2f})",
        flush=True,
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and print every chosen family at every chosen size; the result."""
    rows = []
    for family in args.family or FAMILIES:
        for size in args.size or SIZES:
            rows.append(measure(family, size, args))
            print_row(rows[-1])
    print(f"Medians of {args.runs} runs, of toys ten times as many.")
    print(f"{NOT_REPORTED[0].upper()}{NOT_REPORTED[1:]}.")
    return {
        "benchmark": "hosts", "device": device(), "runs": args.runs, "machine": describe_machine(),
        "versions": {**versions(), "mlx-vlm": metadata.version("mlx-vlm")}, "rows": rows,
    }  # fmt: skip


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = parser("hosts", __doc__, names_result=True)
    add = p.add_argument
    add("--family", action="append", choices=FAMILIES, help="model family; repeat (default: all)")
    add("--size", action="append", choices=SIZES, help="model size; repeat (default: all)")
    add("--pruner", default="received_attention", help="method of the pruned run")
    add("--keep-ratio", type=float, default=0.25, help="share of the visual tokens to keep")
    add("--runs", type=positive, default=20, help="measured runs of each kind")
    add("--warmup", type=natural, default=2, help="warm-up runs of each kind")
    args = p.parse_args(argv)
    if not 0 < args.keep_ratio <= 1:
        raise UserError(f"--keep-ratio is {args.keep_ratio:g}; it must be above 0 and up to 1")
    if util.find_spec("mlx_vlm") is None:
        raise UserError(f"mlx-vlm cannot be found; {INSTALL}")
    return args


main = partial(run_command, parse, run)


if __name__ == "__main__":
    main()
