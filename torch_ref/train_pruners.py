"""Train a learned pruner for the scenes model: `python -m torch_ref.train_pruners METHOD`.

The model comes from `torch_ref.train` (--model, default runs/scenes). By default tower and
language model stay as they are and only the pruner learns; with --unfreeze they learn along.
Stop it at any time: it continues from OUT/METHOD.pt. The pruner's weights go to
OUT/pruners.safetensors, which lies beside an MLX model.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from mlx_vlm_prune.checkpoints.errors import Parser, in_one_sentence, whole

from .training.recipes import LEARNED, PrunerRecipe


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = Parser(prog="python -m torch_ref.train_pruners", description=(__doc__ or "").split("\n")[0])
    add, usual, positive = p.add_argument, PrunerRecipe(), partial(whole, 1)
    add("method", choices=LEARNED)
    add(
        "--model", type=Path, default=Path("runs/scenes"), metavar="FOLDER", help="what train wrote"
    )
    add("--out", type=Path, default=Path("runs/pruners"), metavar="FOLDER")
    add("--keep-tokens", type=positive, default=usual.keep_tokens, help="(default: %(default)s)")
    add("--steps", type=positive, default=usual.steps, help="(default: %(default)s)")
    add("--unfreeze", action="store_true", help="tower and language model too")
    add("--workers", type=partial(whole, 0), default=1, help="processes that draw scenes")
    return p.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; a user's mistake ends in one sentence and exit code 2."""
    with in_one_sentence():
        args = parse(argv)
        from .training.pruners import train  # here, since torch may be missing, and takes seconds

        recipe = PrunerRecipe(keep_tokens=args.keep_tokens, steps=args.steps)
        train(args.method, args.model, args.out, recipe, args.unfreeze, args.workers)


if __name__ == "__main__":
    main()
