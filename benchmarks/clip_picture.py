"""What a method keeps of a drawn clip: five frames of a scene in which one disc moves.

The frames go one by one through the tower and the projector of the built-in model, which never saw
a clip; of their tokens the method chooses as it does of a clip in mlx-vlm's models.
"""

from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image, ImageDraw

from mlx_vlm_prune.generation.overlay import overlay
from mlx_vlm_prune.pruners import plan, resolve
from mlx_vlm_prune.scenes import HELD_OUT_SEEDS, compose

FRAMES, SHARE = 5, 4  # a quarter of the tokens is left
TILE = 224  # pixels
DISC, STEP, RADIUS = (205, 60, 50), 40, 20
SEED = HELD_OUT_SEEDS[1]


def frames() -> list[Image.Image]:
    """The clip."""
    drawn = []
    for number in range(FRAMES):
        picture = compose(SEED).image()
        x, y = 32 + STEP * number, 60 + 26 * number
        box = (x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS)
        ImageDraw.Draw(picture).ellipse(box, fill=DISC)
        drawn.append(picture)
    return drawn


def tiles(model: Any, processor: Any, name: str) -> list[Image.Image]:
    """The frames with the tokens that a method keeps of each."""
    pictures, whole = frames(), plan(name)
    pixels = mx.stack([mx.array(processor.image(picture)) for picture in pictures])
    batch = model.encode(pixels, whole, whole.budgets(model.N, model.N))
    signals = model.project(batch, plan("none")).signals
    rows, columns = model.grid
    of_clip = signals.per_token(lambda row_TN, _: row_TN.reshape(1, -1))  # attention
    clip = of_clip.replace(
        x_BND=signals.x_BND.reshape(1, FRAMES * model.N, -1),
        grid=(FRAMES * rows, columns), frames=FRAMES,
    )  # fmt: skip
    index_BK = resolve(name)(clip, FRAMES * model.N // SHARE).index_BK
    assert index_BK is not None
    kept = np.array(index_BK[0]).astype(int).tolist()
    drawn = []
    for number, picture in enumerate(pictures):
        first = number * model.N
        index = [token - first for token in kept if first <= token < first + model.N]
        seen = overlay(picture, model.grid, index, "")
        drawn.append(seen.resize((TILE, TILE), Image.Resampling.LANCZOS))
    return drawn
