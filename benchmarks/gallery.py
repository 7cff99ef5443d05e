"""Write docs/pruners.md and docs/gallery.html, on every method: `python -m benchmarks.gallery`.

Texts come from each method's file, figures from benchmarks/results, pictures from the built-in
model. `--draw` draws the pictures again, of three scenes and two photographs, with `--pruner` only
those of some methods. `--explore` computes the gallery again. Nothing on the pages is written by
hand.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from mlx_vlm_prune.checkpoints.command_line import Parser, in_one_sentence
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.checkpoints.reading.files import atomic_path, write_atomically
from mlx_vlm_prune.generate import generate
from mlx_vlm_prune.generation.overlay import join_images, overlay
from mlx_vlm_prune.hosts.loading import load
from mlx_vlm_prune.inputs.image import open_image
from mlx_vlm_prune.pruners import METHODS, Method
from mlx_vlm_prune.pruners.listing import options
from mlx_vlm_prune.scenes import HELD_OUT_SEEDS, KINDS, compose

from . import clip_picture, gallery_page
from .gallery_page import gallery
from .readme_tables import markdown
from .report import RESULTS, ROOT, link, random_mark, scenes

PAGE, PICTURES = ROOT / "docs" / "pruners.md", ROOT / "docs" / "pruners"
TILE = 224  # pixels
SEEDS = (HELD_OUT_SEEDS[7], HELD_OUT_SEEDS[1], HELD_OUT_SEEDS[9])
QUESTION = "What does the sign say?"
HEAD = f"""# The methods

This page is made from each method's own file, `benchmarks/results` and the built-in model
(`python -m benchmarks.gallery`).

Pictures: three drawn scenes with the question "{QUESTION}", and two photographs. 49 of 196
tokens are kept, or a mean of 98 over the layers if a method in the decoder cannot keep fewer (then
the last layer with visual tokens is shown). Dark patches were dropped. Patches of the same tint
were merged into the patch with the dot. The model never saw a photograph in training, so the
choices there prove nothing. Methods for clips are shown on five frames of a drawn clip, with a
quarter of its tokens kept.

Accuracy: on held-out scenes, as in the [benchmarks](benchmarks.md). ▲ and ▼ mark figures that are
above and below `random` at the same budget.

The photographs are from [minimind-v](https://github.com/jingyaogong/minimind-v)
(`dataset/eval_images`, Apache-2.0).
"""


def page() -> str:
    """The text of docs/pruners.md."""
    accuracy = scenes(RESULTS)
    return "\n".join([HEAD, *(section(method, accuracy) for method in METHODS.values())])


def section(method: Method, accuracy: dict) -> str:
    """The section of a method: idea, picture, formula and differences, options, accuracy."""
    title, *rest = method.description.split("\n\n")
    parts = [f"## `{method.name}`", title.replace("\n", " ")]
    if (PICTURES / f"{method.name}.jpg").exists():
        seen = "the five frames of a clip" if method.reads_frames else "five images"
        parts.append(f"![What {method.name} keeps of {seen}](pruners/{method.name}.jpg)")
    parts += rest
    facts = [f"Stage: {method.stage.name.lower()}"]
    facts.append("reads the prompt" if method.reads_prompt else "blind to the prompt")
    facts.append("learned" if method.learned else "training-free")
    if method.source:
        facts.append(f"source: {link(method.source)}")
    parts.append("; ".join(facts) + "." + ("" if method.options else " No options."))
    if method.options:
        parts.append("\n".join(f"- `{typed}`: {meaning}" for typed, meaning in options(method)))
    rows = accuracy.get(method.name, {})
    if rows:
        parts.append(accuracy_table(rows))
    return "\n\n".join(parts) + "\n"


def accuracy_table(rows: dict[int, dict]) -> str:
    """Accuracy per kind at each budget, in Markdown."""
    lines = []
    for tokens, row in rows.items():
        cells = [f"{row['accuracy'][kind]:.1%}" for kind in KINDS]
        lines.append([str(tokens), *cells, f"{row['overall']:.1%}{random_mark(row)}"])
    return markdown(["tokens", *KINDS, "mean"], "r" * (len(KINDS) + 2), lines)


def draw(photographs: Sequence[Path], names: Sequence[str] = ()) -> None:
    """Draw a strip of five pictures for each of these methods, else for every method that the
    built-in model can have. Raises UserError for one that it cannot draw.
    """
    model, processor = load()
    # `none` selects nothing, and slots of `attention_pool` have no place in the image.
    drawable = [
        name
        for name in gallery_page.usable_methods(model)
        if name not in ("none", "attention_pool")
    ]
    for name in names:
        if name not in drawable:
            raise UserError(f"--pruner is {name!r}; can be drawn: {', '.join(drawable)}")
    images = _images(photographs)
    PICTURES.mkdir(exist_ok=True)
    for name in tqdm(names or drawable, "pictures", file=sys.stderr, leave=False):
        if METHODS[name].reads_frames:
            tiles = clip_picture.tiles(model, processor, name)
        else:
            tiles = [_tile(model, processor, image, name) for image in images]
        with atomic_path(PICTURES / f"{name}.jpg", replace=True) as temporary:
            join_images(tiles).save(temporary, format="JPEG", quality=82, optimize=True)


def _images(photographs: Sequence[Path]) -> list[Image.Image]:
    """The scenes, and the photographs."""
    return [compose(seed).image() for seed in SEEDS] + [open_image(p) for p in photographs]


def _tile(model, processor, image: Image.Image, name: str) -> Image.Image:
    """An image with the tokens that a method keeps of it."""
    for tokens in (49, 98):
        try:
            answer = generate(model, processor, QUESTION, image, pruner=name, keep_tokens=tokens,
                              max_tokens=1)  # fmt: skip
        except UserError:
            continue
        assert answer.trace
        (picture, grid), *_ = answer.views
        reductions = [step.reductions[0] for step in answer.trace.steps_to_draw()]
        last = ([r for r in reductions if r.slots] or reductions)[-1]
        assert last.index_BK is not None
        index = list(np.array(last.index_BK[0]))
        weights = np.array(last.mixture(grid[0] * grid[1])[0]) if last.merges else None
        drawn = overlay(picture, grid, index, "", weights=weights)
        return drawn.resize((TILE, TILE), Image.Resampling.LANCZOS)
    raise AssertionError(f"{name} can do with neither budget")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; a UserError ends in one sentence and exit code 2."""
    p = Parser("benchmarks.gallery", description=(__doc__ or "").split("\n")[0])
    p.add_argument(
        "--draw",
        type=Path,
        nargs=2,
        metavar="PHOTO",
        help="also draw the pictures in docs/pruners, of three scenes and these two photographs",
    )
    p.add_argument(
        "--pruner",
        nargs="+",
        default=[],
        metavar="NAME",
        help="with --draw: draw only these methods (default: all)",
    )
    p.add_argument(
        "--explore",
        type=Path,
        nargs=3,
        metavar="PHOTO",
        help="also compute docs/gallery.html again, with these three photographs",
    )
    with in_one_sentence():
        args = p.parse_args(argv)
        if args.pruner and args.draw is None:
            raise UserError("--pruner is for --draw, which takes two photographs")
        if args.draw is not None:
            draw(args.draw, args.pruner)
        if args.explore is not None:
            names = [photograph.name for photograph in args.explore]
            gallery(*load(), QUESTION, _images(args.explore), names).save(gallery_page.PAGE)
        write_atomically(gallery_page.PAGE, gallery_page.rendered_again())
        write_atomically(PAGE, page())


if __name__ == "__main__":
    main()
