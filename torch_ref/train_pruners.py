"""Train a learned pruner for the scenes model: `python -m torch_ref.train_pruners METHOD`.

The model comes from `torch_ref.train_scenes` (--model, default runs/scenes). By default tower and
language model stay as they are and only the pruner learns; with --unfreeze they learn along.
Stop it at any time: it continues from OUT/METHOD.pt. The pruner's weights go to
OUT/pruners.safetensors, which lies beside an MLX model.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from mlx_vlm_prune.checkpoints.command_line import Parser, in_one_sentence, whole_number

from .training.recipes import LEARNED, PrunerRecipe


# fmt: off
def build_parser() -> Parser:
    """The command line."""
    parser = Parser(
        "torch_ref.train_pruners", description="Train a learned pruner for the scenes model."
    )
    add, usual, positive = parser.add_argument, PrunerRecipe(), partial(whole_number, 1)
    add("method", choices=LEARNED, help="the pruner to train")
    add("--model", type=Path, default=Path("runs/scenes"), metavar="FOLDER",
        help="what `python -m torch_ref.train_scenes` wrote")
    add("--out", type=Path, default=Path("runs/pruners"), metavar="FOLDER",
        help="where weights and checkpoints go")
    add("--keep-tokens", type=positive, default=usual.keep_tokens, metavar="K",
        help="number of visual tokens that the pruner learns to keep")
    add("--steps", type=positive, default=usual.steps, metavar="N", help="optimizer steps")
    add("--unfreeze", action="store_true", help="train tower and language model along")
    add("--workers", type=partial(whole_number, 0), default=1, metavar="N",
        help="processes that draw scenes")
    return parser
# fmt: on


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; a user's mistake ends in one sentence and exit code 2."""
    parser = build_parser()
    with in_one_sentence(parser):
        args = parser.parse_args(argv)
        from .training.pruners import train  # here, since torch may be missing, and takes seconds

        recipe = PrunerRecipe(keep_tokens=args.keep_tokens, steps=args.steps)
        train(args.method, args.model, args.out, recipe, args.unfreeze, args.workers)


if __name__ == "__main__":
    main()
