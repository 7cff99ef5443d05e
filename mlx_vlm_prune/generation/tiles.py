"""Tiles of a picture, back in their places, to draw what was kept of it in one panel.

Shapes: N patches of a tile in raster order, K slots.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..pruners.contract import Reduction


@dataclass(frozen=True)
class Layout:
    """How the views of a picture lie in it: `rows` x `columns` tiles in raster order, and before or
    behind them the view that shows the whole picture, if any: its number is `overview`."""

    rows: int
    columns: int
    overview: int | None = None

    @property
    def views(self) -> int:
        """How many there are."""
        return self.rows * self.columns + (self.overview is not None)


@dataclass(frozen=True)
class DrawnView:
    """A view's picture, its (rows, columns) of patches, and what was kept of them: the slots' own
    patches, and `weights` (K, N) where slots are mixed."""

    picture: Image.Image
    grid: tuple[int, int]
    kept: list[int]
    weights: np.ndarray | None = None

    @classmethod
    def of(
        cls, view: tuple[Image.Image, tuple[int, int]], reduction: Reduction, N: int
    ) -> "DrawnView":
        index = reduction.index_BK
        kept = [] if index is None else np.array(index[0]).tolist()
        weights = np.array(reduction.mixture(N)[0]) if reduction.merges else None
        return cls(*view, kept, weights)


def nearest_layout(views: int, size: tuple[int, int], *, has_overview: bool = True) -> Layout:
    """The layout of so many views of an image of (width, height): tiles in rows and columns whose
    ratio is the nearest to the image's, and where there are several, a last view of all of it."""
    has_overview &= views > 1
    (width, height), tiles = size, views - has_overview
    shapes = [(tiles // c, c) for c in range(1, tiles + 1) if tiles % c == 0]
    rows, columns = min(
        shapes, key=lambda shape: abs(math.log(shape[1] / shape[0] * height / width))
    )
    return Layout(rows, columns, overview=tiles if has_overview else None)


def join_tiles(tiles: Sequence[DrawnView], rows: int, columns: int) -> DrawnView:
    """Tiles of equal size as one view of the picture that they were cut from."""
    (height, width), (w, h) = tiles[0].grid, tiles[0].picture.size
    picture = Image.new("RGB", (columns * w, rows * h))
    places_RrCc = np.arange(rows * height * columns * width).reshape(rows, height, columns, width)
    places_TN = places_RrCc.swapaxes(1, 2).reshape(rows * columns, height * width)
    for t, tile in enumerate(tiles):
        picture.paste(tile.picture, (t % columns * w, t // columns * h))
    kept = [place for t, tile in enumerate(tiles) for place in places_TN[t][tile.kept].tolist()]
    weights = None
    if any(tile.weights is not None for tile in tiles):
        parts = []
        for t, tile in enumerate(tiles):
            mixed_KN = np.eye(height * width)[tile.kept] if tile.weights is None else tile.weights
            parts.append(np.zeros((len(mixed_KN), places_TN.size)))
            parts[-1][:, places_TN[t]] = mixed_KN
        weights = np.concatenate(parts)
    return DrawnView(picture, (rows * height, columns * width), kept, weights)


def views_of_panels(
    images: Sequence[int], layouts: Sequence[Layout | None]
) -> list[tuple[list[int], Layout | None]]:
    """The views of each panel: all of an image where its layout is known, else each alone.

    `images` is the image of each view.
    """
    panels: list[tuple[list[int], Layout | None]] = []
    for view, image in enumerate(images):
        layout = layouts[image] if image < len(layouts) else None
        if layout and view and images[view - 1] == image:
            panels[-1][0].append(view)
        else:
            panels.append(([view], layout))
    return panels
