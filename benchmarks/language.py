"""Is our language model as fast as mlx-lm's? `python -m benchmarks.language`.

On MLX's default device, whatever it is, nothing pruned: for each shape in each format of weights
(`bfloat16`, `4bit`, `float32`, …) both read a prompt and compute new tokens in turns, with the same
random weights. Their logits are compared first, as in benchmarks/rivals.py, whose rows these are.
On a GPU ours is measured again as it reads a pruned prompt whose positions have gaps, every row
rotated by itself; on a CPU that is the same. The ratio is theirs ÷ ours; the last line is one JSON
object of all figures.

    python -m benchmarks.language --shape llava-7b --shape minimind2-v --runs 10
"""

import argparse
from collections.abc import Sequence
from functools import partial
from importlib import metadata
from typing import Any

import mlx.core as mx
from mlx import nn

from mlx_vlm_prune.checkpoints.config import MiniMindConfig
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.machine.hardware import describe_machine, on_cpu, versions
from mlx_vlm_prune.models.language.minimind import MiniMind
from mlx_vlm_prune.models.loading import DTYPES

from .backend_mlx import device
from .command_line import natural, parser, positive, run_command
from .model_shapes import SHAPES, TEXT_TOKENS, shape
from .rivals import RIVALS, measure_pair, pair_languages, print_rows, require_equal

# Each format of weights: what is not quantized, and bits of what is.
FORMATS = {
    "bfloat16": ("bfloat16", None), "4bit": ("bfloat16", 4), "8bit": ("bfloat16", 8),
    "float16": ("float16", None), "float32": ("float32", None),
}  # fmt: skip
RTOL = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 0.1}  # of the largest logit
DEFAULT_SHAPES, DEFAULT_FORMATS = ("minimind2-v", "llava-7b-2"), ("bfloat16", "4bit", "float32")


def make_model(config: MiniMindConfig, dtype: str, bits: int | None) -> MiniMind:
    """A language model of random weights."""
    mx.random.seed(0)
    model = MiniMind(config)
    for part in (*model.layers, model):  # one by one: all in float32 first might not fit
        part.set_dtype(DTYPES[dtype])
        if bits:
            nn.quantize(part, bits=bits)
        mx.eval(part.parameters())
    return model


def measure(name: str, weights: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of a shape in a format: prefill and token, on a GPU both again with gaps."""
    config, (dtype, bits) = shape(name), FORMATS[weights]
    assert isinstance(config.text, MiniMindConfig)
    model, rows = make_model(config.text, dtype, bits), config.N + TEXT_TOKENS
    measured = []
    for gaps in (False,) if on_cpu() else (False, True):
        pair = pair_languages(model, rows, contiguous=not gaps)
        difference = require_equal(name, "mlx-lm", pair, RTOL[dtype])
        header = {
            "shape": name, "rival": "mlx-lm with gaps in ours" if gaps else "mlx-lm",
            "weights": weights, "gaps": gaps, "device": pair.device, "difference": difference,
            "prompt_rows": rows,
        }  # fmt: skip
        measured += (entries := measure_pair(pair, header, args))
        print_rows(entries, weights)
    return measured


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = parser("language", __doc__, names_result=True)
    add = p.add_argument
    add("--shape", action="append", help=f"{', '.join(SHAPES)}; repeat (default: two)")
    add("--weights", action="append", choices=FORMATS, help="repeat (default: the first, 4bit, and"
        " float32)")  # fmt: skip
    add("--tokens", type=positive, default=16, help="new tokens of every answer")
    add("--runs", type=positive, default=10, help="measured runs of each side")
    add("--warmup", type=natural, default=2, help="warm-up runs of each side")
    args = p.parse_args(argv)
    args.shape, args.weights = args.shape or DEFAULT_SHAPES, args.weights or DEFAULT_FORMATS
    if RIVALS["mlx-lm"].missing:
        raise UserError(f"mlx-lm cannot be found; python -m pip install {RIVALS['mlx-lm'].install}")
    for name in args.shape:
        shape(name)  # a wrong one is refused before any is measured
    return args


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and print every shape in every format; the result."""
    rows = []
    for name in args.shape:
        for weights in args.weights:
            rows += measure(name, weights, args)
            mx.clear_cache()
    return {
        "benchmark": "language", "device": device(), "runs": args.runs, "warmup": args.warmup,
        "new_tokens": args.tokens, "machine": describe_machine(),
        "versions": {**versions(), "mlx-lm": metadata.version("mlx-lm")}, "rows": rows,
    }  # fmt: skip


main = partial(run_command, parse, run)


if __name__ == "__main__":
    main()
