"""A picture of what was kept: dropped patches dimmed, merged groups tinted, the numbers below.

Shapes: N patches in raster order, K slots.
"""

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..pruners.trace import Trace
from .tiles import DrawnView, Layout, join_tiles, views_of_panels

LONG_SIDE = 672  # pixels, about; every patch gets a whole number of them
OVERVIEW_SIDE = LONG_SIDE // 3  # of a whole picture beside its tiles
MARGIN = 12
GAP = 16
PAPER, INK = (250, 250, 248), (40, 42, 48)
DIM, EDGE = 0.28, (255, 255, 255)
GOLDEN = 0.618034  # of a turn of the colour wheel: neighbouring groups differ


def overlay(
    image: Image.Image,
    grid: tuple[int, int],
    kept: Sequence[int],
    caption: str,
    *,
    weights: np.ndarray | None = None,
    long_side: int = LONG_SIDE,
) -> Image.Image:
    """Draw which of `grid` = (rows, columns) patches were kept of an image, and write a caption.

    `kept`: indices of the slots' own patches; empty where slots have none. `weights`, (K, N):
    how each slot is mixed. Patches mixed into one slot share a tint and an outline; without
    own patches, brightness shows how much the slots read of a patch.
    """
    if weights is not None and not len(weights):
        weights = None  # a chain that ends in no slot
    rows, columns = grid
    patch = max(4, round(long_side / max(grid)))
    canvas = image.convert("RGB").resize((columns * patch, rows * patch), Image.Resampling.LANCZOS)
    pixels = np.asarray(canvas).astype(np.float32)
    group = _groups(rows * columns, kept, weights)
    if kept or weights is None:
        light = np.where(group >= 0, 1.0, DIM)
    else:
        read = weights.sum(axis=0)
        light = DIM + (1 - DIM) * read / read.max()
    light_HW = _enlarge(light.reshape(grid), patch)[..., None]
    grey = pixels.mean(axis=-1, keepdims=True)
    pixels = light_HW * (light_HW * pixels + (1 - light_HW) * grey)
    if weights is not None and kept:
        pixels = _tint(pixels, group.reshape(grid), patch)
    drawn = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
    if kept and len(kept) < rows * columns:
        edges = group if weights is not None else np.minimum(group, 0)  # the kept as one area
        _outline(drawn, edges.reshape(grid), patch)
        if weights is not None:
            _mark(drawn, kept, columns, patch)
    return add_caption(drawn, caption)


def draw_trace(
    trace: Trace, views: Sequence[tuple[Image.Image, tuple[int, int]]], caption: str,
    layouts: Sequence[Layout | None] = (),
) -> Image.Image:  # fmt: skip
    """What was kept of every view, each a picture with its (rows, columns) of visual tokens.

    Steps lie side by side, images below one another. Tiles lie in their image where its layout is
    known, each of another image has a panel of its own.
    """
    steps, rows = trace.steps_to_draw(), []
    for numbers, layout in views_of_panels(trace.images, layouts):
        pictures = []
        for step in steps:
            drawn = [DrawnView.of(views[v], step.reductions[v], trace.sizes[v]) for v in numbers]
            left = sum(len(view.kept) for view in drawn)
            below = f"{step.name}: {left} left" if len(steps) > 1 else caption
            pictures.append(_panel(drawn, layout, below))
        rows.append(join_images(pictures) if len(pictures) > 1 else pictures[0])
    if len(steps) > 1:
        return add_caption(join_images(rows, down=True), caption)
    return join_images(rows) if len(rows) > 1 else rows[0]


def _panel(views: list[DrawnView], layout: Layout | None, caption: str) -> Image.Image:
    """An image: its tiles in their places, and a view of the whole of it beside them."""
    if layout is None or len(views) == 1:
        return _draw(views[0], caption)
    overview = None if layout.overview is None else views.pop(layout.overview)
    joined = join_tiles(views, layout.rows, layout.columns)
    if overview is None:
        return _draw(joined, caption)
    pictures = [_draw(joined, ""), _draw(overview, "", OVERVIEW_SIDE)]
    return add_caption(join_images(pictures), caption)


def _draw(view: DrawnView, caption: str, long_side: int = LONG_SIDE) -> Image.Image:
    return overlay(
        view.picture, view.grid, view.kept, caption, weights=view.weights, long_side=long_side
    )


def join_images(pictures: Sequence[Image.Image], *, down: bool = False) -> Image.Image:
    """Several pictures side by side, or `down` the page."""
    sizes = np.array([picture.size for picture in pictures])
    along, across = (1, 0) if down else (0, 1)
    size = [0, 0]
    size[along] = int(sizes[:, along].sum()) + GAP * (len(pictures) - 1)
    size[across] = int(sizes[:, across].max())
    joined, place = Image.new("RGB", (size[0], size[1]), PAPER), [0, 0]
    for picture in pictures:
        joined.paste(picture, (place[0], place[1]))
        place[along] += picture.size[along] + GAP
    return joined


def _groups(N: int, kept: Sequence[int], weights: np.ndarray | None) -> np.ndarray:
    """The slot each patch went into, (N,); -1 for none."""
    if weights is not None:
        return np.where(weights.any(axis=0), weights.argmax(axis=0), -1)
    group = np.full(N, -1)
    group[list(kept)] = np.arange(len(kept))
    return group


def _enlarge(grid: np.ndarray, patch: int) -> np.ndarray:
    """A value of each patch as one of each pixel."""
    return grid.repeat(patch, axis=0).repeat(patch, axis=1)


def _tint(pixels: np.ndarray, group: np.ndarray, patch: int) -> np.ndarray:
    """A calm colour over each group of two or more patches."""
    hue = group * GOLDEN % 1 * 6
    channels = [np.clip(np.abs((hue + turn) % 6 - 3) - 1, 0, 1) for turn in (0, 4, 2)]
    colour = 90 + 165 * np.stack(channels, axis=-1)
    shared = np.bincount(group[group >= 0].ravel(), minlength=group.max() + 1) > 1
    strength = np.where((group >= 0) & shared[group], 0.3, 0.0)[..., None]
    strength, colour = _enlarge(strength, patch), _enlarge(colour, patch)
    tinted: np.ndarray = (1 - strength) * pixels + strength * colour
    return tinted


def _outline(drawn: Image.Image, group: np.ndarray, patch: int) -> None:
    """Thin lines wherever two patches belong to different slots."""
    brush = ImageDraw.Draw(drawn)
    rows, columns = group.shape
    around = np.pad(group, 1, constant_values=-1)
    for r, c in np.argwhere(around[1:, 1:-1] != around[:-1, 1:-1]):
        y = min(r * patch, rows * patch - 1)
        brush.line([(c * patch, y), ((c + 1) * patch, y)], fill=EDGE)
    for r, c in np.argwhere(around[1:-1, 1:] != around[1:-1, :-1]):
        x = min(c * patch, columns * patch - 1)
        brush.line([(x, r * patch), (x, (r + 1) * patch)], fill=EDGE)


def _mark(drawn: Image.Image, kept: Sequence[int], columns: int, patch: int) -> None:
    """A dot on each slot's own patch."""
    brush, radius = ImageDraw.Draw(drawn), max(2, patch // 12)
    for index in kept:
        x, y = (index % columns + 0.5) * patch, (index // columns + 0.5) * patch
        box = (x - radius, y - radius, x + radius, y + radius)
        brush.ellipse(box, fill=EDGE, outline=INK)


def add_caption(drawn: Image.Image, caption: str) -> Image.Image:
    """The picture with a band below that holds the caption, as many lines as it takes."""
    if not caption:
        return drawn
    size = min(26, max(11, drawn.width // 36))
    font = ImageFont.load_default(size)
    letters = max(8, int((drawn.width - 2 * MARGIN) / (0.52 * size)))
    lines = [part for line in caption.split("\n") for part in textwrap.wrap(line, letters)]
    text = "\n".join(lines) or " "
    page = Image.new("RGB", drawn.size, PAPER)
    box = ImageDraw.Draw(page).multiline_textbbox((MARGIN, MARGIN), text, font=font)
    page = Image.new("RGB", (drawn.width, drawn.height + int(box[3]) + MARGIN), PAPER)
    page.paste(drawn, (0, 0))
    place = (MARGIN, drawn.height + MARGIN)
    ImageDraw.Draw(page).multiline_text(place, text, font=font, fill=INK)
    return page
