"""Train a model of drawn scenes: `python -m torch_ref.train_scenes --out runs/scenes`.

`--size deep` is scenes-deep: the built-in model with twelve layers in place of four. `--size pages`
is the built-in model with the words of printed pages, and `--size pages-deep` is scenes-pages: that
one with twelve layers.
`--size large` is scenes-large: 384 pixels, 576 visual tokens, twelve layers, scenes and pages.

Stop it at any time: it continues from its last checkpoint. The weights end as
OUT/scenes.pth (MiniMind2-V's published layout) and OUT/clip (a Hugging Face CLIP
folder), which `python -m convert to-mlx` brings over.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from mlx_vlm_prune.checkpoints.command_line import Parser, in_one_sentence, whole_number
from mlx_vlm_prune.checkpoints.errors import UserError

from .training.recipes import RECIPES


# fmt: off
def build_parser() -> Parser:
    """The command line."""
    parser = Parser(
        "torch_ref.train_scenes", description="Train a model of drawn scenes, from random weights"
        " or from a smaller model."
    )
    add = parser.add_argument
    add("--size", choices=list(RECIPES), default="small",
        help="small: the built-in model; deep: scenes-deep, the same with twelve layers; pages:"
        " the built-in model, which learns printed pages; pages-deep: the same with twelve layers;"
        " large: scenes-large, of larger scenes and pages (default: small)")
    add("--model", type=Path, metavar="FOLDER", help="the model that pages-deep grows"
        " from: a folder that convert made of --size pages")
    add("--out", type=Path, metavar="FOLDER", help="where weights and checkpoints go (default:"
        " runs/scenes, others runs/scenes-SIZE)")
    add("--compile", action="store_true", help="compile the tower on a CPU, too: faster after the"
        " first minute; needs a C++ compiler (default: on CUDA alone)")
    add("--minutes", type=_minutes, default=float("inf"), metavar="N", help="stop after N minutes")
    add("--steps", type=partial(whole_number, 1), metavar="N",
        help=f"optimizer steps (default: {_of_each('steps')})")
    add("--tower-steps", type=partial(whole_number, 0), metavar="N",
        help="how many of the steps train the vision tower alone (default:"
        f" {_of_each('tower_steps')})")
    add("--batch", type=partial(whole_number, 1), metavar="N",
        help=f"pictures of a step (default: {_of_each('batch')})")
    add("--workers", type=partial(whole_number, 0), default=1, metavar="N",
        help="processes that draw scenes")
    return parser
# fmt: on


def _of_each(name: str) -> str:
    """A number of every size's recipe."""
    return ", ".join(f"{size} {getattr(recipe, name)}" for size, recipe in RECIPES.items())


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not minutes > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return minutes


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; a user's mistake ends in one sentence and exit code 2."""
    parser = build_parser()
    with in_one_sentence(parser):
        args = parser.parse_args(argv)
        from .training.scenes import train  # here, since torch may be missing, and takes seconds

        if (args.size == "pages-deep") != bool(args.model):
            raise UserError("--model belongs to --size pages-deep, which needs it")
        options = {name: getattr(args, name) for name in ("steps", "tower_steps", "batch", "model")}
        given = {name: value for name, value in options.items() if value is not None}
        out = args.out or Path("runs", "scenes" if args.size == "small" else f"scenes-{args.size}")
        recipe = replace(RECIPES[args.size], **given)
        train(out, recipe, args.minutes, args.workers, args.compile)


if __name__ == "__main__":
    main()
