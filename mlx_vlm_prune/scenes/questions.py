"""Six kinds of question about a scene, each with one right answer.

A question is asked only where the scene answers it without ambiguity: the colour
of "the star" only when there is one star, the text only when there is a sign.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .draw import CELLS, COLOURS, SHAPES, SMALL, Canvas, Scene, Thing, compose

KINDS = ("existence", "colour", "counting", "relation", "grounding", "reading")


@dataclass(frozen=True)
class Question:
    """One question about one scene."""

    kind: str
    text: str
    answer: str


def ask(scene: Scene, kind: str, rng: np.random.Generator) -> Question | None:
    """A question of one kind, or None where this scene cannot answer one."""
    return _ASK[kind](scene, rng)


def question_set(
    seeds: range, per_kind: int, canvas: Canvas = SMALL
) -> Iterator[tuple[Scene, list[Question]]]:
    """Scenes with their questions, until each of the six kinds was asked `per_kind` times."""
    left = dict.fromkeys(KINDS, per_kind)
    for seed in seeds:
        scene, rng = compose(seed, canvas), np.random.default_rng([seed, 2])
        questions = [q for kind in KINDS if left[kind] and (q := ask(scene, kind, rng))]
        for question in questions:
            left[question.kind] -= 1
        if questions:
            yield scene, questions
        if not any(left.values()):
            return
    raise ValueError(f"{len(seeds)} seeds are too few for {per_kind} questions of each kind")


def _article(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def plural(shape: str) -> str:
    return shape + ("es" if shape == "cross" else "s")


def _name(thing: Thing) -> str:
    return f"{thing.colour} {thing.shape}"


def _unique(scene: Scene) -> list[Thing]:
    names = [_name(t) for t in scene.things]
    return [t for t in scene.things if names.count(_name(t)) == 1]


def _pick(rng: np.random.Generator, options):
    return options[int(rng.integers(len(options)))]


def _existence(scene: Scene, rng: np.random.Generator) -> Question:
    present = {(t.colour, t.shape) for t in scene.things}
    if rng.random() < 0.5:
        colour, shape = _pick(rng, sorted(present))
        answer = "yes"
    else:
        absent = [(c, s) for c in COLOURS for s in SHAPES if (c, s) not in present]
        colours, shapes = {c for c, _ in present}, {s for _, s in present}
        near = [(c, s) for c, s in absent if c in colours or s in shapes]
        colour, shape = _pick(rng, near if near and rng.random() < 0.6 else absent)
        answer = "no"
    name = _article(f"{colour} {shape}")
    text = _pick(rng, (f"Is there {name}?", f"Can you see {name}?"))
    return Question("existence", text, answer)


def _colour(scene: Scene, rng: np.random.Generator) -> Question | None:
    shapes = [t.shape for t in scene.things]
    single = [t for t in scene.things if shapes.count(t.shape) == 1]
    if not single:
        return None
    thing = _pick(rng, single)
    text = _pick(rng, (f"What colour is the {thing.shape}?", f"Which colour is the {thing.shape}?"))
    return Question("colour", text, thing.colour)


def _counting(scene: Scene, rng: np.random.Generator) -> Question:
    count = {"shapes": len(scene.things)}
    for shape in SHAPES:
        count[plural(shape)] = sum(t.shape == shape for t in scene.things)
    for colour in COLOURS:
        count[f"{colour} shapes"] = sum(t.colour == colour for t in scene.things)
    number = _pick(rng, sorted(set(count.values())))  # the answers evenly, not the subjects
    subject = _pick(rng, [s for s, n in count.items() if n == number])
    return Question("counting", f"How many {subject} are there?", str(number))


def _relation(scene: Scene, rng: np.random.Generator) -> Question | None:
    unique = _unique(scene)
    pairs = [(a, b) for a in unique for b in unique if a is not b and _sides(a, b)]
    if not pairs:
        return None
    a, b = _pick(rng, pairs)
    answer, words = _pick(rng, _sides(a, b))
    return Question("relation", f"Is the {_name(a)} {words} the {_name(b)}?", answer)


def _sides(a: Thing, b: Thing) -> list[tuple[str, str]]:
    """Where a lies seen from b, on each axis on which their cells differ."""
    sides = []
    if a.cell[0] != b.cell[0]:
        sides.append(("left" if a.cell[0] < b.cell[0] else "right", "left or right of"))
    if a.cell[1] != b.cell[1]:
        sides.append(("above" if a.cell[1] < b.cell[1] else "below", "above or below"))
    return sides


def _grounding(scene: Scene, rng: np.random.Generator) -> Question | None:
    unique = _unique(scene)
    if not unique:
        return None
    thing = _pick(rng, unique)
    text = _pick(rng, (f"Where is the {_name(thing)}?", f"Which cell is the {_name(thing)} in?"))
    return Question("grounding", text, thing.cell)


def _reading(scene: Scene, rng: np.random.Generator) -> Question | None:
    if scene.sign is None:
        return None
    text = _pick(rng, ("What does the sign say?", "Read the sign."))
    return Question("reading", text, scene.sign.text.lower())


def content(scene: Scene, rng: np.random.Generator) -> Question:
    """What lies in a cell: asked in training only, it teaches where things are."""
    contents = {t.cell: _name(t) for t in scene.things}
    if scene.sign:
        contents |= dict.fromkeys(scene.sign.cells, "sign")
    cell = _pick(rng, sorted(contents) if rng.random() < 0.7 else CELLS)
    return Question("content", f"What is in cell {cell}?", contents.get(cell, "nothing"))


_ASK = {
    "existence": _existence,
    "colour": _colour,
    "counting": _counting,
    "relation": _relation,
    "grounding": _grounding,
    "reading": _reading,
    "content": content,
}
