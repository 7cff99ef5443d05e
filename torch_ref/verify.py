"""Does a converted model compute in MLX what its source computes in PyTorch? For every method.

python -m torch_ref.verify sft_vlm_512.pth my-model --image photo.jpg
python -m torch_ref.verify llava-1.5-7b-hf my-llava --image photo.jpg --pruner fastv --device cuda
python -m torch_ref.verify --pruner ./my_method.py

Without a model the built-in one is compared with itself, which checks a method and its twin. MLX
answers first, in a process of its own. PyTorch then recomputes the same prompt and pixels from the
source, with none of MLX's code. The exit code is 1 if they differ by more than float32 explains.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from mlx_vlm_prune.checkpoints.command_line import Parser, in_one_sentence, whole_number
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.scenes import CHECKPOINT

DESCRIPTION = (
    "Compare a model in MLX with its source in PyTorch, method by method: the tokens kept, the"
    " visual rows that the language model reads, the logits, the greedy answer. Both compute in"
    " float32. Without a model: the built-in one, in both."
)
EXAMPLE = "example: python -m torch_ref.verify sft_vlm_512.pth my-model --image photo.jpg"


# fmt: off
def build_parser() -> Parser:
    """The command line."""
    parser = Parser("torch_ref.verify", description=DESCRIPTION, epilog=EXAMPLE)
    add = parser.add_argument
    add("source", nargs="?", metavar="SRC",
        help="the published model: a .pth, a folder, or a Hugging Face name")
    add("model", nargs="?", metavar="MLX_FOLDER", help="the folder that `to-mlx` made of it")
    add("--vision", metavar="FOLDER", help="its CLIP or SigLIP (default: beside SRC)")
    add("--image", action="extend", nargs="+", metavar="FILE",
        help="image files (default: a drawn scene)")
    add("--prompt", default="What is in the picture?", metavar="TEXT", help="the question")
    add("--pruner", action="extend", nargs="+", metavar="SPEC",
        help="methods or chains (default: all methods that work there)")
    add("--keep-ratio", type=float, default=0.5, metavar="R",
        help="share of an image's visual tokens to keep")
    add("--max-tokens", type=partial(whole_number, 1), default=16, metavar="N",
        help="tokens of the answer that are compared")
    add("--device", choices=("cpu", "mps", "cuda"), default="cpu", help="where PyTorch computes")
    add("--mlx-device", choices=("cpu", "gpu"), help="where MLX computes; on a cpu both choose"
        " tokens in float64, so near-ties go one way (default: MLX's own choice)")
    add("--json", type=Path, metavar="FILE", help="write all figures, versions and the machine")
    return parser
# fmt: on


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; a user's mistake ends in one sentence and exit code 2."""
    parser = build_parser()
    with in_one_sentence(parser):
        agrees = run(parser.parse_args(argv))
        sys.stdout.flush()
        sys.exit(0 if agrees else 1)


def run(args: argparse.Namespace) -> bool:
    """Compare, print, write; whether all methods agree. Raises UserError."""
    from .generation.verification import (
        verify,
    )  # here, since torch may be missing, and takes seconds

    if args.source is None:
        args.source = args.model = str(CHECKPOINT)
    elif args.model is None:
        raise UserError(
            f"MLX_FOLDER is missing: give {args.source} and the folder that `convert to-mlx` made"
            " of it, or neither for the built-in model"
        )
    try:
        return verify(args)
    except KeyboardInterrupt:
        print("\ninterrupted: nothing is written", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
