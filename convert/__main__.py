"""`python -m convert`: trained weights from PyTorch to MLX and back, byte for byte."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .checkpoint import DTYPES, as_mlx, to_mlx, to_torch
from .detect import KV_HEADS
from .errors import Parser, UserError


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m convert", description=__doc__)
    ways = parser.add_subparsers(dest="way", required=True)
    there = ways.add_parser("to-mlx", help="from MiniMind2-V as published to a folder for MLX")
    there.add_argument("source", metavar="SRC", type=Path, help="a .pth, or a folder with one")
    there.add_argument("target", metavar="DST", type=Path, help="the folder to make")
    there.add_argument(
        "--vision", type=Path, metavar="FOLDER", help="CLIP ViT-B/16 in Hugging Face's layout"
    )
    there.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="holds tokenizer.json")
    there.add_argument("--dtype", choices=DTYPES, help="default: each tensor's own")
    there.add_argument("--heads", type=_positive, help="query heads; no .pth says how many")
    there.add_argument("--kv-heads", type=_positive, help=f"default {KV_HEADS}, as in MiniMind2")
    back = ways.add_parser("to-torch", help="from a folder for MLX to MiniMind2-V as published")
    back.add_argument("source", metavar="SRC", type=Path, help="a folder that to-mlx made")
    back.add_argument("target", metavar="DST", type=Path, help="the .pth to write")
    back.add_argument("--vision", type=Path, metavar="FOLDER", help="also write the tower, here")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    if not text.isdigit() or not 0 < int(text) <= 1024:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 1024")
    return int(text)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; a user's mistake ends in one sentence and exit code 2."""
    args = parse(argv)
    try:
        print(run(args))
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def run(args: argparse.Namespace) -> str:
    """Convert, and say what was done and what was assumed."""
    if args.way == "to-torch":
        to_torch(args.source, args.target, args.vision)
        return f"{args.target}: MiniMind2-V as published" + (
            f"; {args.vision}: its CLIP tower" if args.vision else ""
        )
    source = as_mlx(args.source, args.vision, args.tokenizer, args.heads, args.kv_heads)
    to_mlx(source, args.target, args.dtype)
    text, vision = source.config["text_config"], source.config["vision_config"]
    assumed = "" if args.heads or args.kv_heads else " (assumed, as in every MiniMind2)"
    said = (
        f"{args.target}: {text['num_hidden_layers']} layers of {text['hidden_size']}, "
        f"{text['num_attention_heads']} heads, {text['num_key_value_heads']} key/value heads"
        f"{assumed}, tower of {vision['num_hidden_layers']} layers of {vision['hidden_size']}"
    )
    if source.reading is None:
        said += "\nno preprocessor_config.json was found: CLIP's own values are assumed"
    return said


if __name__ == "__main__":
    main()
