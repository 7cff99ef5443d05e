"""Paint a page: texts in one of five free fonts, slightly turned, with light noise.

The fonts lie in fonts/ with their licences, reduced to printable ASCII. Versions of FreeType
differ by grey levels along the edges of letters, never in what the page says.
"""

from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .page import Page, Shape, Text

FOLDER = Path(__file__).parent / "fonts"
OVERSAMPLE = 2  # drawn twice as large, turned, and averaged down


def draw(page: Page) -> Image.Image:
    """The picture, `page.side` pixels on both sides, RGB."""
    side = page.side * OVERSAMPLE
    picture = Image.new("RGB", (side, side), page.paper)
    brush = ImageDraw.Draw(picture)
    for shape in page.shapes:
        _paint_shape(brush, shape, page.ink)
    for text in page.texts:
        _paint_text(brush, text, page)
    turned = picture.rotate(page.turn, Image.Resampling.BILINEAR, fillcolor=page.paper)
    pixels = np.asarray(turned.reduce(OVERSAMPLE)).astype(np.float32)
    rng = np.random.default_rng([page.seed, 5])
    noisy = pixels + page.noise * rng.normal(size=(page.side, page.side, 1))
    return Image.fromarray(np.clip(noisy, 0, 255).round().astype(np.uint8))


def _paint_shape(brush: ImageDraw.ImageDraw, shape: Shape, ink: tuple[int, int, int]) -> None:
    points = [(OVERSAMPLE * x, OVERSAMPLE * y) for x, y in shape.points]
    if shape.is_polygon:
        brush.polygon(points, fill=shape.fill or ink)
    else:
        brush.line(points, fill=shape.fill or ink, width=round(OVERSAMPLE * shape.width))


def _paint_text(brush: ImageDraw.ImageDraw, text: Text, page: Page) -> None:
    place = (OVERSAMPLE * text.x, OVERSAMPLE * text.y)
    font = load_font(page.font, round(OVERSAMPLE * text.size))
    brush.text(place, text.text, font=font, fill=page.ink, anchor=text.anchor)


@cache
def load_font(name: str, pixels: int) -> ImageFont.FreeTypeFont:
    """One of FONTS; its layout is Pillow's own, which is there with any version."""
    path = FOLDER / f"{name}.ttf"
    return ImageFont.truetype(str(path), pixels, layout_engine=ImageFont.Layout.BASIC)
