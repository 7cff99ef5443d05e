"""Compose and draw a scene: a few shapes, perhaps a sign, and mostly background.

The picture is divided into 4 x 4 cells, a1 (top left) to d4 (bottom right). A
thing lies wholly inside one cell, a sign inside two neighbours, so every
question has one right answer. The same seed gives the same scene everywhere;
the pixels may differ by a grey level between Pillow versions.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 224  # pixels, both sides
GRID = 4  # cells, both ways
CELL = SIZE // GRID
CELLS = tuple(f"{column}{row}" for row in "1234" for column in "abcd")
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
COLOURS = {
    "red": (214, 39, 40),
    "orange": (255, 140, 20),
    "yellow": (245, 220, 40),
    "green": (40, 160, 60),
    "blue": (35, 90, 220),
    "purple": (130, 50, 170),
    "pink": (250, 140, 190),
    "white": (250, 250, 250),
}
LETTERS = "AEHKLMORSTXZ"
SIGN_LETTERS = 3
OVERSAMPLE = 2  # drawn twice as large and averaged down: smooth edges


@dataclass(frozen=True)
class Canvas:
    """How large pictures are and what may lie in them; lengths in pixels, as ranges."""

    size: int = SIZE  # both sides
    most_things: int = 6
    radii: tuple[float, float] = (13, 25)
    shift: float = 12.0  # how far at most a thing lies off the middle of its cell
    letter_heights: tuple[float, float] = (27, 33)
    sign_shift: float = 4.0

    @property
    def cell(self) -> int:
        """Both sides of a cell."""
        return self.size // GRID


SMALL = Canvas()
LARGE = Canvas(384, 12, (9, 40), 36.0, (18, 50), 8.0)


@dataclass(frozen=True)
class Thing:
    """A coloured shape; x, y and radius in pixels."""

    shape: str
    colour: str
    cell: str
    x: float
    y: float
    radius: float
    turn: float  # radians


@dataclass(frozen=True)
class Sign:
    """A board with a short text; x, y is its centre and height that of a letter, in pixels."""

    text: str
    cells: tuple[str, str]
    x: float
    y: float
    height: float
    dark: bool

    @property
    def pitch(self) -> float:
        """Pixels from one letter's centre to the next."""
        return 0.95 * self.height

    @property
    def half_size(self) -> tuple[float, float]:
        """Half the board's width and height, in pixels."""
        return 1.6 * self.pitch, 0.72 * self.height


@dataclass(frozen=True)
class Scene:
    """What is in the picture of one seed."""

    seed: int
    things: tuple[Thing, ...]
    sign: Sign | None
    canvas: Canvas = SMALL

    def image(self) -> Image.Image:
        """The picture, RGB: 224 x 224, or the canvas's size."""
        return draw(self)


def compose(seed: int, canvas: Canvas = SMALL) -> Scene:
    """The scene of a seed: 1 to 6 things, or as many as a canvas has; in 60 % of scenes a sign."""
    rng = np.random.default_rng(seed)
    free = set(range(GRID * GRID))
    sign = _place_sign(rng, free, canvas) if rng.random() < 0.6 else None
    shapes, colours = list(SHAPES), list(COLOURS)
    if rng.random() < 0.5:  # a few kinds only, so that there is something to count
        shapes = list(rng.choice(shapes, int(rng.integers(1, 3)), replace=False))
    if rng.random() < 0.3:
        colours = list(rng.choice(colours, int(rng.integers(1, 3)), replace=False))
    cells = rng.permutation(sorted(free))[: int(rng.integers(1, canvas.most_things + 1))]
    things = tuple(_place_thing(rng, int(cell), shapes, colours, canvas) for cell in cells)
    return Scene(seed, things, sign, canvas)


def _place_sign(rng: np.random.Generator, free: set[int], canvas: Canvas) -> Sign:
    row, column = int(rng.integers(GRID)), int(rng.integers(GRID - 1))
    left, right = GRID * row + column, GRID * row + column + 1
    free -= {left, right}
    text = "".join(rng.choice(list(LETTERS), SIGN_LETTERS))
    height = rng.uniform(*canvas.letter_heights)
    x = (column + 1) * canvas.cell + rng.uniform(-canvas.sign_shift, canvas.sign_shift)
    y = (row + 0.5) * canvas.cell + rng.uniform(-canvas.sign_shift, canvas.sign_shift)
    return Sign(text, (CELLS[left], CELLS[right]), x, y, height, bool(rng.random() < 0.5))


def _place_thing(
    rng: np.random.Generator, cell: int, shapes: list[str], colours: list[str], canvas: Canvas
) -> Thing:
    radius = rng.uniform(*canvas.radii)
    room = min(canvas.shift, canvas.cell / 2 - radius)
    x = (cell % GRID + 0.5) * canvas.cell + rng.uniform(-room, room)
    y = (cell // GRID + 0.5) * canvas.cell + rng.uniform(-room, room)
    turn = rng.uniform(-0.2, 0.2)
    return Thing(str(rng.choice(shapes)), str(rng.choice(colours)), CELLS[cell], x, y, radius, turn)


def draw(scene: Scene) -> Image.Image:
    """Paint a scene; the colours jitter and the background varies with the seed."""
    rng = np.random.default_rng([scene.seed, 1])
    side = scene.canvas.size * OVERSAMPLE
    picture = _background(rng, scene.canvas.size // 4).resize(
        (side, side), Image.Resampling.BICUBIC
    )
    brush = ImageDraw.Draw(picture)
    for thing in scene.things:
        colour = np.array(COLOURS[thing.colour]) + rng.integers(-12, 13, 3)
        fill = tuple(int(c) for c in np.clip(colour, 0, 255))
        _paint_shape(brush, thing, fill)
    if scene.sign:
        _paint_sign(brush, scene.sign)
    return picture.reduce(OVERSAMPLE)


def _background(rng: np.random.Generator, n: int) -> Image.Image:
    """A muted gradient with soft blotches, n x n pixels."""
    base = rng.uniform(70, 150) + rng.uniform(-18, 18, 3)
    slope = rng.uniform(-25, 25, (2, 3))
    y, x = np.mgrid[-0.5 : 0.5 : n * 1j, -0.5 : 0.5 : n * 1j]
    field = base + y[..., None] * slope[0] + x[..., None] * slope[1]
    coarse = int(rng.integers(4, 20))
    blotch = rng.normal(0, rng.uniform(3, 9), (coarse, coarse)).astype(np.float32)
    spread = Image.fromarray(blotch).resize((n, n), Image.Resampling.BICUBIC)
    field = field + np.asarray(spread)[..., None]
    field = field + rng.normal(0, rng.uniform(0, 4), (n, n, 1))
    return Image.fromarray(np.clip(field, 0, 255).astype(np.uint8))


def _paint_shape(brush: ImageDraw.ImageDraw, thing: Thing, fill: tuple[int, ...]) -> None:
    x, y, r = (OVERSAMPLE * v for v in (thing.x, thing.y, thing.radius))
    if thing.shape == "circle":
        brush.ellipse((x - 0.92 * r, y - 0.92 * r, x + 0.92 * r, y + 0.92 * r), fill=fill)
        return
    cos, sin = np.cos(thing.turn), np.sin(thing.turn)
    points = outline(thing.shape) @ np.array([[cos, sin], [-sin, cos]])
    brush.polygon([(x + r * px, y + r * py) for px, py in points], fill=fill)


@cache
def outline(shape: str) -> np.ndarray:
    """The outline of a shape in the unit circle, (points, 2), y downwards."""
    if shape == "square":
        s = 0.8
        return np.array([(-s, -s), (s, -s), (s, s), (-s, s)])
    if shape == "triangle":
        return _regular(3, 1.05) + np.array([0, 0.12])
    if shape == "star":
        return np.stack([_regular(5, 1.08), _regular(5, 0.42, np.pi / 5)], axis=1).reshape(-1, 2)
    if shape == "cross":
        a, b = 0.32, 0.95
        arm, turn = np.array([(a, -a), (b, -a), (b, a)]), np.array([[0, 1], [-1, 0]])
        return np.concatenate([arm @ np.linalg.matrix_power(turn, i) for i in range(4)])
    if shape == "heart":
        t = np.linspace(0, 2 * np.pi, 40, endpoint=False)
        x = 16 * np.sin(t) ** 3
        y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        return np.stack([x, -y - 2], axis=1) / 16.5
    raise ValueError(f"no outline for shape {shape!r}; there are {', '.join(SHAPES)}")


def _regular(corners: int, radius: float, turn: float = 0.0) -> np.ndarray:
    angle = turn - np.pi / 2 + np.arange(corners) * 2 * np.pi / corners
    return radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)


@cache
def _font(pixels: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=pixels)


def _paint_sign(brush: ImageDraw.ImageDraw, sign: Sign) -> None:
    board, ink = ((35, 35, 40), (245, 245, 240)) if sign.dark else ((240, 238, 228), (25, 25, 30))
    half_w, half_h = sign.half_size
    box = (sign.x - half_w, sign.y - half_h, sign.x + half_w, sign.y + half_h)
    brush.rounded_rectangle([OVERSAMPLE * v for v in box], radius=8, fill=board)
    font = _font(round(1.3 * sign.height * OVERSAMPLE))
    for i, letter in enumerate(sign.text):
        x = OVERSAMPLE * (sign.x + (i - (len(sign.text) - 1) / 2) * sign.pitch)
        brush.text(
            (x, OVERSAMPLE * sign.y),
            letter,
            font=font,
            fill=ink,
            anchor="mm",
            stroke_width=1,
            stroke_fill=ink,
        )
