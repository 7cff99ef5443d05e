"""The options of `generate` on the command line.

A value is checked where it is used, so that a Python caller hears of it too.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..checkpoints.errors import Parser
from ..checkpoints.reading.files import parse_json
from ..models.loading import DTYPES


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = Parser(
        prog="python -m mlx_vlm_prune.generate",
        description="Answer a prompt about images with fewer visual tokens. Without arguments: "
        "a sample question, answered with all visual tokens and with half of them.",
    )
    add = p.add_argument
    add("--model", help="folder or hub name (default: the built-in scenes model)")
    add("--image", action="append", default=[], help="an image file; repeat for several")
    add("--prompt", "-p", help="the question ('-' reads stdin); <image> marks an image's place")
    add("--pruner", help="NAME, NAME:option=value,… or a chain NAME+NAME")
    add("--keep-ratio", type=float, help="share of the visual tokens to keep, above 0 to 1")
    add("--keep-tokens", type=int, help="how many visual tokens of each image to keep")
    add("--budget-ms", type=float, metavar="MS", help="instead: as many as the first token can "
        "come with in this time, by a calibration of this machine")  # fmt: skip
    add("--budget-gb", type=float, metavar="GB", help="instead: as many as fit into this memory")
    add("--positions", help="keep or renumber kept tokens' positions (default: as its paper)")
    add("--max-tokens", "-m", type=int, default=256, help="most tokens to answer with")
    add("--temp", "--temperature", type=float, default=0.0, help="0 (the default) is greedy")
    add("--top-p", type=float, default=1.0)
    add("--seed", type=int, default=0)
    add("--chat-template-config", type=_object, metavar="JSON", help='as {"open_thinking": true}')
    add("--prefill-step-size", type=int, metavar="ROWS", help="mlx-vlm models: rows read at once")
    add("--kv-bits", type=float, help="mlx-vlm models: bits of a number in the cache")
    add("--quantized-kv-start", type=int, metavar="ROWS",
        help="mlx-vlm models: once the cache has more rows than these (default 5000)")  # fmt: skip
    add("--resize-shape", type=int, nargs="+", metavar="PIXELS",
        help="mlx-vlm models: one or two sides that pictures are to fit in")  # fmt: skip
    add("--num-draft-tokens", type=int, metavar="N", help="models with a twig: tokens that it may"
        " guess ahead (TwigVLM's 5); the greedy answer stays the same")  # fmt: skip
    add("--revision", help="of a hub name: a branch, tag or commit")
    add("--dtype", default="auto", help=f"auto, {', '.join(DTYPES)}")
    add("--json", type=Path, metavar="FILE", help="write the answer and all figures")
    add("--overlay", type=Path, metavar="FILE.png", help="draw what was kept")
    add("--compare", action="store_true", help="full and pruned, side by side")
    add("--verbose", action=argparse.BooleanOptionalAction, default=True, help="print figures")
    args = p.parse_args(argv)
    args.is_sample = not args.image and args.prompt is None and args.model is None
    return args


def _object(text: str) -> dict[str, Any]:
    try:
        value = parse_json(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object")
    return value
