"""The drawn worlds that a model is trained on: pictures, questions, and what each patch holds.

Pictures and words are data, which both frameworks share: no MLX is imported.

Shapes: N patches, G groups of words that a patch must predict.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from PIL import Image

from mlx_vlm_prune import scenes
from mlx_vlm_prune.scenes import pages
from mlx_vlm_prune.scenes.pages.draw import OVERSAMPLE, load_font
from mlx_vlm_prune.scenes.pages.words import PRINTED
from mlx_vlm_prune.scenes.questions import content
from mlx_vlm_prune.scenes.vocabulary import PLACES, SLOTS, large_words, words

from .layout_targets import LAYOUT_GROUPS, bars, text_targets

IGNORE = -100
PATCH = 16
BACKGROUND = "nothing"
LETTERS = (*scenes.LETTERS.lower(), *("##" + letter for letter in scenes.LETTERS.lower()))
SCENE_GROUPS: dict[str, tuple[str, ...]] = {
    "kind": (*scenes.SHAPES, "sign", BACKGROUND),
    "tint": tuple(scenes.COLOURS),
    "cell": scenes.CELLS,
    "place": PLACES,
    "letter": LETTERS,
    "slot": SLOTS,
}
PAGE_GROUPS: dict[str, tuple[str, ...]] = {
    "printed": PRINTED,
    "digit": tuple("0123456789"),
    "next digit": tuple("##" + digit for digit in "0123456789"),
}
GLYPHS = "0123456789abcdefghijklmnopqrstuvwxyz"  # that a patch of a page must name, in both cases
THIRDS = np.array([-PATCH / 3, 0.0, PATCH / 3])  # where in a patch, from its centre
SUMMARY = len(scenes.SHAPES) * len(scenes.COLOURS) + 1  # what CLS must name: things, and a sign
# How often each kind is asked: the slow ones more often.
SCENE_MIX = {
    "existence": 2,
    "colour": 2,
    "counting": 3,
    "relation": 3,
    "grounding": 2,
    "reading": 2,
    "content": 2,
}


def patch_centres(size: int) -> tuple[np.ndarray, np.ndarray]:
    """x and y of every patch's centre in pixels, each (N,), row by row."""
    centre = (np.arange(size // PATCH) + 0.5) * PATCH
    y, x = np.meshgrid(centre, centre, indexing="ij")
    return x.ravel(), y.ravel()


def cells_of(x: np.ndarray, y: np.ndarray, size: int) -> np.ndarray:
    """Positions within CELLS of points in a picture."""
    side = size // scenes.GRID
    return (y // side * scenes.GRID + x // side).astype(int)


@dataclass(frozen=True)
class SceneWorld:
    """Scenes on a canvas."""

    canvas: scenes.Canvas = scenes.SMALL
    mix = SCENE_MIX  # how often each kind is asked

    def compose(self, seed: int) -> scenes.Scene:
        return scenes.compose(seed, self.canvas)

    def picture(self, drawn: scenes.Scene) -> Image.Image:
        return drawn.image()

    def ask(
        self, drawn: scenes.Scene, kind: str, rng: np.random.Generator
    ) -> scenes.Question | None:
        return content(drawn, rng) if kind == "content" else scenes.ask(drawn, kind, rng)

    def held_out(self, per_kind: int) -> Iterator[tuple[scenes.Scene, list[scenes.Question]]]:
        return scenes.question_set(scenes.HELD_OUT_SEEDS, per_kind, self.canvas)

    def patch_targets(self, drawn: scenes.Scene, groups: Sequence[str]) -> np.ndarray:
        """What each patch holds, (N, G): positions within the words of these groups, or IGNORE."""
        size = self.canvas.size
        x, y = patch_centres(size)
        column = {name: groups.index(name) for name in SCENE_GROUPS}
        target = np.full((len(x), len(groups)), IGNORE)
        target[:, column["kind"]] = len(scenes.SHAPES) + 1
        target[:, column["cell"]] = cells_of(x, y, size)
        for thing in drawn.things:
            distance = np.hypot(x - thing.x, y - thing.y)
            target[(distance < thing.radius + 11), column["kind"]] = IGNORE  # partly covered
            middle = int(thing.y // PATCH) * (size // PATCH) + int(thing.x // PATCH)
            on = distance < 0.8 * thing.radius + 3
            on[middle] = True
            target[on, column["kind"]] = scenes.SHAPES.index(thing.shape)
            target[on, column["tint"]] = list(scenes.COLOURS).index(thing.colour)
            target[on, column["cell"]] = scenes.CELLS.index(thing.cell)
            target[on, column["place"]] = 0
            target[middle, column["place"]] = 1
        if drawn.sign:
            _sign_targets(drawn.sign, x, y, target, column)
        return target

    def summary(self, drawn: scenes.Scene) -> np.ndarray:
        """What is in the picture, (SUMMARY,) of 0 and 1."""
        present = np.zeros(SUMMARY, np.float32)
        for thing in drawn.things:
            shape = scenes.SHAPES.index(thing.shape)
            present[shape * len(scenes.COLOURS) + list(scenes.COLOURS).index(thing.colour)] = 1
        present[-1] = drawn.sign is not None
        return present

    def glyphs(self, drawn: scenes.Scene) -> np.ndarray:
        """None, (N, THIRDS) of IGNORE: signs have targets of their own."""
        return np.full(((self.canvas.size // PATCH) ** 2, len(THIRDS)), IGNORE)

    def layout_targets(self, drawn: scenes.Scene) -> np.ndarray:
        """None, (N, LAYOUT_GROUPS) of IGNORE."""
        return np.full(((self.canvas.size // PATCH) ** 2, len(LAYOUT_GROUPS)), IGNORE)


def _sign_targets(
    sign: scenes.Sign, x: np.ndarray, y: np.ndarray, target: np.ndarray, column: dict[str, int]
) -> None:
    half_w, half_h = sign.half_size
    near = (np.abs(x - sign.x) < half_w + 8) & (np.abs(y - sign.y) < half_h + 8)
    target[near, column["kind"]] = IGNORE
    board = (np.abs(x - sign.x) < half_w - 2) & (np.abs(y - sign.y) < half_h - 2)
    target[board, column["kind"]] = len(scenes.SHAPES)
    for i, letter in enumerate(sign.text):
        offset = np.abs(x - (sign.x + (i - 1) * sign.pitch))
        on = (offset < sign.pitch / 2 - 2) & (np.abs(y - sign.y) < sign.height / 2 + 2)
        which = scenes.LETTERS.index(letter) + (len(scenes.LETTERS) if i else 0)
        target[on, column["letter"]] = which
        target[on, column["slot"]] = i


@dataclass(frozen=True)
class PageWorld:
    """Printed pages."""

    page_size: pages.PageSize = pages.LARGE
    mix = pages.ODDS

    def compose(self, seed: int) -> pages.Page:
        return pages.compose(seed, self.page_size)

    def picture(self, drawn: pages.Page) -> Image.Image:
        return pages.draw(drawn)

    def ask(self, drawn: pages.Page, kind: str, rng: np.random.Generator) -> scenes.Question | None:
        return pages.ask(drawn, kind, rng)

    def held_out(self, per_kind: int) -> Iterator[tuple[pages.Page, list[scenes.Question]]]:
        return pages.page_questions(scenes.HELD_OUT_SEEDS, per_kind, self.page_size)

    def patch_targets(self, drawn: pages.Page, groups: Sequence[str]) -> np.ndarray:
        """A patch names the word whose middle line is nearest to it, and of a number the first two
        of the digits whose middles lie in it."""
        x, y = patch_centres(drawn.side)
        target = np.full((len(x), len(groups)), IGNORE)
        target[:, groups.index("cell")] = cells_of(x, y, drawn.side)
        target[:, groups.index("kind")] = SCENE_GROUPS["kind"].index(BACKGROUND)
        nearest = np.full(len(x), np.inf)
        for text in drawn.texts:
            (x0, x1), _, off, _ = _along(drawn, text, x, y)
            near = (x > x0 - PATCH / 2) & (x < x1 + PATCH / 2) & (off < PATCH / 2 + text.size / 2)
            target[near, groups.index("kind")] = IGNORE
            on = near & (off < PATCH / 2) & (off < nearest)
            nearest[on] = off[on]
            for name in PAGE_GROUPS:
                target[on, groups.index(name)] = IGNORE
            if not text.text.isdigit():
                on &= (x > x0 - 3) & (x < x1 + 3)
                target[on, groups.index("printed")] = PRINTED.index(text.text.lower())
                continue
            for patch in np.flatnonzero(on):
                middles = x0 + (np.arange(len(text.text)) + 0.5) / len(text.text) * (x1 - x0)
                inside = np.flatnonzero(np.abs(middles - x[patch]) <= PATCH / 2)
                for place in inside[:2]:
                    name = "next digit" if place else "digit"
                    if target[patch, groups.index(name)] == IGNORE:
                        target[patch, groups.index(name)] = int(text.text[place])
        return target

    def summary(self, drawn: pages.Page) -> np.ndarray:
        return np.zeros(SUMMARY, np.float32)

    def glyphs(self, drawn: pages.Page) -> np.ndarray:
        """Places in GLYPHS of what is printed in each third of each patch, (N, THIRDS), or IGNORE.

        A patch names only what lies on the middle line of a text within half a patch of its centre.
        """
        x, y = patch_centres(drawn.side)
        x, y = x[:, None] + THIRDS, y[:, None]
        target, nearest = (np.full(x.shape, n) for n in (IGNORE, PATCH / 2))
        for text in drawn.texts:
            _, across, off, ends = _along(drawn, text, x, y)
            on = (across >= 0) & (across < 1) & (off < nearest)
            nearest[on] = off[on]
            letter = np.searchsorted(ends, across[on] * ends[-1], side="right")
            target[on] = [GLYPHS.index(text.text[place].lower()) for place in letter]
        return target

    def layout_targets(self, drawn: pages.Page) -> np.ndarray:
        """Where each patch's text or bar stands, (N, LAYOUT_GROUPS): places in each, or IGNORE."""
        x, y = patch_centres(drawn.side)
        target, nearest = np.full((len(x), len(LAYOUT_GROUPS)), IGNORE), np.full(len(x), PATCH / 2)
        for text, place in zip(drawn.texts, text_targets(drawn), strict=True):
            (x0, x1), _, off, _ = _along(drawn, text, x, y)
            on = (x > x0 - PATCH / 2) & (x < x1 + PATCH / 2) & (off < nearest)
            nearest[on] = off[on]
            target[on] = [place.get(name, IGNORE) for name in LAYOUT_GROUPS]
        straight = np.stack(replace(drawn, turn=-drawn.turn).turned(x, y), axis=1)
        for polygon, place in bars(drawn).values():
            low, high = np.min(polygon.points, axis=0), np.max(polygon.points, axis=0)
            reach = np.maximum(high - low, PATCH) / 2  # a point or a low bar fills no patch
            on = (np.abs(straight - (low + high) / 2) <= reach).all(axis=1)
            target[on] = [place.get(name, IGNORE) for name in LAYOUT_GROUPS]
        return target


def _along(
    page: pages.Page, text: pages.Text, x: np.ndarray, y: np.ndarray
) -> tuple[tuple[float, float], np.ndarray, np.ndarray, np.ndarray]:
    """Where points of the picture lie on a text as it is drawn and turned.

    Its left and right end in pixels; each point's place along it, 0 at its left end and 1 at its
    right; each point's distance from its middle line in pixels; how far from its left end each
    letter ends, before it is turned.
    """
    font = load_font(page.font, round(OVERSAMPLE * text.size))
    lengths = [font.getlength(text.text[: i + 1]) / OVERSAMPLE for i in range(len(text.text))]
    left = text.x - lengths[-1] * {"l": 0.0, "m": 0.5, "r": 1.0}[text.anchor[0]]
    x0, y0 = page.turned(left, text.y)
    x1, y1 = page.turned(left + lengths[-1], text.y)
    across = (x - x0) / max(x1 - x0, 1e-6)
    off = np.abs(y - (y0 + np.clip(across, 0, 1) * (y1 - y0)))
    return (x0, x1), across, off, np.array(lengths)


World = SceneWorld | PageWorld


@dataclass(frozen=True)
class Curriculum:
    """The words of a model and the worlds that it learns, a picture of each in turn.

    A world that stands there several times has as many pictures.
    """

    size: int  # of the pictures, both sides in pixels
    tokens: tuple[str, ...]  # the vocabulary, in the order of its ids
    groups: dict[str, tuple[str, ...]]  # the words that a patch must predict
    worlds: tuple[World, ...]

    @property
    def side(self) -> int:
        """Patches in a row."""
        return self.size // PATCH

    @cached_property
    def ids(self) -> dict[str, int]:
        """Every word's token id."""
        return {word: i for i, word in enumerate(self.tokens)}

    @cached_property
    def group_ids(self) -> dict[str, list[int]]:
        """Token ids of the words of each group."""
        return {name: [self.ids[word] for word in group] for name, group in self.groups.items()}

    def world(self, seed: int) -> World:
        """The world of a seed."""
        return self.worlds[seed % len(self.worlds)]


SMALL = Curriculum(scenes.SIZE, tuple(words()), SCENE_GROUPS, (SceneWorld(),))
PAGES = Curriculum(
    scenes.SIZE, tuple(large_words()), SCENE_GROUPS | PAGE_GROUPS,
    (SceneWorld(), *[PageWorld(pages.SMALL)] * 3),
)  # fmt: skip
LARGE = Curriculum(
    scenes.LARGE.size, tuple(large_words()), SCENE_GROUPS | PAGE_GROUPS,
    (SceneWorld(scenes.LARGE), PageWorld()),
)  # fmt: skip
