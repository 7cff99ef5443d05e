"""Drawn worlds as data to train on: `python -m benchmarks.scenes_data --format minimind --out DIR`.

Writes DIR/train and DIR/valid as MiniMind-V's parquet, as LLaVA's JSON, or as JSON lines, the last
two with their pictures in DIR/images. A scene is an example, and its questions are turns about one
picture; with `--separate` each is an example, as the built-in model, which knows one turn only, was
trained. Pictures that methods are judged on are in neither file; the same options write the same
files. `--world pages` writes printed pages, `--world scenes pages` a picture of each in turn. The
last line is one JSON object of what was written.

    python -m benchmarks.scenes_data --format jsonl --kinds farthest --turns 1 --out farthest
"""

import argparse
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from mlx_vlm_prune.checkpoints.command_line import Parser, in_one_sentence
from mlx_vlm_prune.checkpoints.errors import UserError, missing_package
from mlx_vlm_prune.checkpoints.reading.files import atomic_path
from mlx_vlm_prune.inputs.prompt import IMAGE_MARK
from mlx_vlm_prune.scenes import KINDS, TRAIN_SEEDS, Question, Scene, ask, compose, pages
from mlx_vlm_prune.scenes.questions import content

from .command_line import natural, positive

# How often each kind of question is asked, beside the others; as in the scenes model's training.
ODDS = {
    "existence": 2, "colour": 2, "counting": 3, "relation": 3, "grounding": 2, "reading": 2,
    "content": 2, "farthest": 2, "highest": 2,
}  # fmt: skip
PIECE = 512  # pictures that processes draw before the next are due
TRIES = 8  # questions tried for each turn: a picture answers some kinds only, and none twice
CLEARLY = 12  # pixels by which a shape is farther, or higher, than the next
VALID_SEEDS = TRAIN_SEEDS[len(TRAIN_SEEDS) // 2 :]  # the trainers of scenes read from the first on


def farthest(scene: Scene, rng: np.random.Generator) -> Question | None:
    """A kind that the built-in model never saw: which shape is farthest from the sign?"""
    if scene.sign is None or len(scene.things) < 2:
        return None
    distances = [np.hypot(t.x - scene.sign.x, t.y - scene.sign.y) for t in scene.things]
    *_, second, last = np.argsort(distances)
    if distances[last] - distances[second] < CLEARLY:
        return None
    return Question("farthest", "Which shape is farthest from the sign?", scene.things[last].shape)


def highest(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Another: which shape is highest in the picture?"""
    first, *others = sorted(scene.things, key=lambda thing: thing.y)
    if not others or others[0].y - first.y < CLEARLY:
        return None
    return Question("highest", "Which shape is highest?", first.shape)


# Kinds that the built-in model is not judged on; the first it was trained on all the same.
MORE_KINDS = {"content": content, "farthest": farthest, "highest": highest}


def question_of(scene: Scene, kind: str, rng: np.random.Generator) -> Question | None:
    """A question of a kind, or None where this scene cannot answer one."""
    more = MORE_KINDS.get(kind)
    return more(scene, rng) if more else ask(scene, kind, rng)


@dataclass(frozen=True)
class World:
    """How a picture of a seed is drawn and asked about; `usual` kinds of question are asked where
    no others are named."""

    compose: Callable[[int], Any]
    picture: Callable[[Any], Image.Image]
    ask: Callable[[Any, str, np.random.Generator], Question | None]
    odds: dict[str, int]
    usual: tuple[str, ...]


WORLDS = {
    "scenes": World(compose, Scene.image, question_of, ODDS, (*KINDS, "content")),
    "pages": World(
        partial(pages.compose, page_size=pages.SMALL),
        pages.draw,
        pages.ask,
        pages.ODDS,
        tuple(pages.ODDS),
    ),
}


@dataclass(frozen=True)
class Example:
    """A picture's seed and bytes, and what is asked about it."""

    seed: int
    picture: bytes
    questions: tuple[Question, ...]

    def turns(self, keys: tuple[str, str], speakers: tuple[str, str]) -> list[dict[str, str]]:
        """As a conversation; the picture's mark stands in the first turn."""
        texts = [text for q in self.questions for text in (q.text, q.answer)]
        texts[0] = f"{IMAGE_MARK}\n{texts[0]}"
        return [
            dict(zip(keys, (speakers[n % 2], text), strict=True)) for n, text in enumerate(texts)
        ]


@dataclass(frozen=True)
class Asking:
    """Worlds, a picture of each in turn; kinds of question, where a world has none of them its
    usual ones; the most questions about a picture; and the kind that is asked first."""

    kinds: Sequence[str] = ()
    turns: int = 8
    always: str | None = None
    worlds: Sequence[str] = ("scenes",)

    def world_of(self, seed: int) -> World:
        return WORLDS[self.worlds[seed % len(self.worlds)]]

    def questions(self, world: World, drawn: Any) -> tuple[Question, ...]:
        """Different questions, at most `turns`; the same ones for the same picture."""
        rng = np.random.default_rng([drawn.seed, 3])
        kinds = [kind for kind in self.kinds if kind in world.odds] or world.usual
        odds = np.array([world.odds[kind] for kind in kinds], float)
        tried = rng.choice(kinds, TRIES * self.turns, p=odds / odds.sum())
        questions = (world.ask(drawn, str(kind), rng) for kind in tried)
        return tuple(islice(dict.fromkeys(filter(None, questions)), self.turns))


def examples(seeds: range, count: int, asking: Asking, workers: int = 1) -> Iterator[Example]:
    """The first `count` pictures that answer a question of these kinds. Raises UserError.

    With `always` that kind is the first question about each, and pictures that do not answer it are
    left out. The examples are the same for any number of processes that draw them.
    """
    example_of = partial(example, asking=asking)
    with ExitStack() as stack:
        drawn: Iterator[Example | None] = map(example_of, seeds)
        if workers > 1:
            pool = stack.enter_context(get_context("spawn").Pool(workers))
            # In pieces: a pool asks for all its seeds at once.
            pieces = (seeds[n : n + PIECE] for n in range(0, len(seeds), PIECE))
            drawn = (e for piece in pieces for e in pool.map(example_of, piece, chunksize=16))
        written = 0
        for drawn_example in islice(filter(None, drawn), count):
            written += 1
            yield drawn_example
    if written < count:
        raise UserError(f"there are only {written} such pictures, not {count}")


def example(seed: int, asking: Asking) -> Example | None:
    """A picture that answers a question of these kinds, and with `always` one of that; else
    None."""
    world, always = asking.world_of(seed), asking.always
    drawn = world.compose(seed)
    first = world.ask(drawn, always, np.random.default_rng([seed, 4])) if always else None
    if always and not first:
        return None
    questions = asking.questions(world, drawn)
    if first:
        questions = tuple(dict.fromkeys((first, *questions)))[: asking.turns]
    if not questions:
        return None
    picture = io.BytesIO()
    # Level 1: smaller files took most of the time.
    world.picture(drawn).save(picture, "PNG", compress_level=1)
    return Example(seed, picture.getvalue(), questions)


def write_minimind(drawn: Iterator[Example], folder: Path, split: str) -> None:
    """FOLDER/split.parquet, as minimind-v's `sft_i2t.parquet`."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetWriter
    except ImportError:
        raise missing_package("pyarrow", "writing parquet") from None
    schema = pyarrow.schema(
        [("conversations", pyarrow.string()), ("image_bytes", pyarrow.binary())]
    )
    with ParquetWriter(folder / f"{split}.parquet", schema) as writer:
        while group := list(islice(drawn, 1000)):
            turns = [e.turns(("role", "content"), ("user", "assistant")) for e in group]
            columns = [[json.dumps(t) for t in turns], [e.picture for e in group]]
            writer.write_table(pyarrow.table(columns, schema=schema))


def write_llava(drawn: Iterator[Example], folder: Path, split: str) -> None:
    """FOLDER/split.json, as LLaVA's `llava_v1_5_mix665k.json`, and pictures."""
    with (folder / f"{split}.json").open("w", encoding="utf-8") as file:
        file.write("[")
        for n, example in enumerate(drawn):
            turns = example.turns(("from", "value"), ("human", "gpt"))
            record = {
                "id": f"{example.seed}", "image": save(example, folder), "conversations": turns,
            }  # fmt: skip
            file.write(",\n" * bool(n) + json.dumps(record))
        file.write("]\n")


def write_jsonl(drawn: Iterator[Example], folder: Path, split: str) -> None:
    """FOLDER/split.jsonl and pictures; a single question stands as the evaluation reads it."""
    with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
        for example in drawn:
            record: dict[str, Any] = {"image": save(example, folder)}
            if len(example.questions) == 1:
                (question,) = example.questions
                record |= {"question": question.text, "answer": question.answer}
                record |= {"kind": question.kind}
            else:
                turns = example.turns(("role", "content"), ("user", "assistant"))
                record["conversations"] = turns
            file.write(json.dumps(record) + "\n")


def save(example: Example, folder: Path) -> str:
    """Write the picture; its name from FOLDER on."""
    name = f"images/{example.seed}.png"
    (folder / "images").mkdir(exist_ok=True)
    (folder / name).write_bytes(example.picture)
    return name


WRITERS = {"minimind": write_minimind, "llava": write_llava, "jsonl": write_jsonl}


def write(args: argparse.Namespace) -> dict[str, Any]:
    """The files, whole or none; what they hold. Raises UserError where they cannot be written."""
    half = len(TRAIN_SEEDS) // 2
    asking = Asking(args.kinds or (), args.turns, args.always, args.world)
    check_kinds(asking)
    figures: dict[str, Any] = {"format": args.format, "folder": str(args.out)}
    with atomic_path(args.out, folder=True) as folder:
        for split, seeds, count in (
            ("train", TRAIN_SEEDS[args.first : half], args.examples),
            ("valid", VALID_SEEDS, args.valid),
        ):
            if count:
                kinds: Counter[str] = Counter()
                drawn = examples(seeds, count, asking, args.workers)
                shown = tqdm(drawn, total=count, desc=split, unit="picture", leave=False)
                parts = separated(shown) if args.separate else iter(shown)
                WRITERS[args.format](counted(parts, kinds), folder, split)
                figures[split] = {"pictures": count, "questions": dict(sorted(kinds.items()))}
    return figures


def check_kinds(asking: Asking) -> None:
    """Raises UserError for a kind of question that no picture of these worlds is asked."""
    known = dict.fromkeys(kind for name in asking.worlds for kind in WORLDS[name].odds)
    for kind in (*asking.kinds, *([asking.always] if asking.always else [])):
        if kind not in known:
            raise UserError(
                f"{kind} is no question about {' or '.join(asking.worlds)}; there are"
                f" {', '.join(known)}"
            )
    if asking.always and len(asking.worlds) > 1:
        raise UserError("always is for one world; write each into a folder of its own")


def separated(drawn: Iterable[Example]) -> Iterator[Example]:
    """An example for each question."""
    for example in drawn:
        yield from (replace(example, questions=(question,)) for question in example.questions)


def counted(drawn: Iterable[Example], kinds: Counter[str]) -> Iterator[Example]:
    """The examples, while their questions are counted by kind."""
    for example in drawn:
        kinds.update(question.kind for question in example.questions)
        yield example


def build_parser() -> Parser:
    """The command line."""
    parser = Parser("benchmarks.scenes_data", description=(__doc__ or "").split("\n\n")[1])
    add = parser.add_argument
    add("--format", choices=WRITERS, default="minimind", help="what to write (minimind)")
    add("--out", type=Path, default=Path("scenes-data"), metavar="DIR",
        help="a folder that does not exist yet (scenes-data)")  # fmt: skip
    add("--world", nargs="+", choices=WORLDS, default=["scenes"], metavar="WORLD",
        help=f"{' or '.join(WORLDS)}, or both, a picture of each in turn (scenes)")  # fmt: skip
    add("--examples", type=positive, default=1000, metavar="N", help="pictures to train on (1000)")
    add("--valid", type=natural, default=100, metavar="N", help="held-out pictures (100)")
    add("--turns", type=positive, default=8, metavar="N", help="most questions about a picture (8)")
    add("--kinds", nargs="+", metavar="KIND",
        help=f"of scenes {', '.join(ODDS)} (all but the last two); of pages"
        f" {', '.join(pages.ODDS)} (all, also where only the other world's are named)")  # fmt: skip
    add("--always", metavar="KIND",
        help="a kind that every picture is asked first")  # fmt: skip
    add("--workers", type=positive, default=1, metavar="N", help="processes that draw (1)")
    add("--separate", action="store_true",
        help="an example for each question, in place of turns")  # fmt: skip
    add("--first", type=natural, default=0, metavar="N", help="number of the first picture (0)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; a UserError ends in one sentence and exit code 2."""
    parser = build_parser()
    with in_one_sentence(parser):
        print(json.dumps(write(parser.parse_args(argv))))


if __name__ == "__main__":
    main()
