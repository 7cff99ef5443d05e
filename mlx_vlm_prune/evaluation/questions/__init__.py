"""Question sets: what is asked about which image, and how an answer is judged.

One format is one file: `read` yields its questions, `score` judges one answer by the rule
its authors published. The table below names them all; `--format` takes these names.

Nothing heavy is imported before a format is used, and MLX never: a question set can be
looked at without a model.
"""

import difflib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image

from ...checkpoints.errors import UserError


@dataclass(frozen=True)
class Question:
    """One question about one image.

    `answers` are the right ones; the first is the one whose log-probability is measured.
    `image` is a path, a file's bytes, or a function that makes the picture, called late.
    Questions of one `group` are judged together (MME: two about an image; MMBench: one
    question with its options in turn); without it each stands alone. `told` is whatever
    the format's own `score` needs beside.
    """

    id: str
    text: str
    answers: tuple[str, ...]
    image: Path | bytes | Callable[[], Image.Image]
    kind: str = "all"
    group: str = ""
    told: Any = None


@dataclass
class Bad:
    """What could not be read: an error, or with `skip` counted, named and left out."""

    skip: bool = False
    found: list[str] = field(default_factory=list)

    def __call__(self, where: str, why: str) -> None:
        """Note one fault, such as ("a.jsonl, line 3", "there is no answer")."""
        if not self.skip:
            raise UserError(f"{where}: {why} (skip_bad leaves such questions out)")
        self.found.append(f"{where}: {why}")


@dataclass(frozen=True)
class Source:
    """Where a question set lies: its file or folder, and its images' folder if they are apart.

    `split` chooses a part of it where a format has parts. `boxes` is how coordinates are asked
    for and read where answers are boxes: "unit" (0 to 1), "thousand" (0 to 1000) or "pixels".
    """

    path: Path
    images: Path | None = None
    split: str | None = None
    boxes: str = "unit"


def mean(scores: list[float]) -> float:
    """How the questions of a group count unless the format says otherwise."""
    return sum(scores) / len(scores)


@dataclass(frozen=True)
class Format:
    """A file of this folder, ready to use.

    A module has `read(source, bad) -> Iterator[Question]` and `score(question, said) -> float`,
    0 to 1. It may have `together(scores) -> float`, how a group counts (default: the mean);
    `SCALE` and `UNIT`, by what a kind's mean is multiplied for display (default: 100, "%");
    `TOTAL`, "mean" over the groups (default) or "sum" over the kinds; and `more(questions,
    said) -> dict[str, float]`, further figures its authors report (POPE: F1, share of yes),
    in the unit in which they are shown (POPE: %).
    """

    name: str
    module: ModuleType

    def read(self, source: Source, bad: Bad) -> Iterator[Question]:
        """The questions one by one; their images are not opened yet.

        Raises UserError at once for a missing file or folder, and on the way for a faulty
        record, unless `bad` skips those. No two questions have one id.
        """
        return _distinct(self.module.read(source, bad), bad)

    def score(self, question: Question, said: str) -> float:
        return self.module.score(question, said)

    def together(self, scores: list[float]) -> float:
        return getattr(self.module, "together", mean)(scores)

    def more(self, questions: list[Question], said: list[str]) -> dict[str, float]:
        return self.module.more(questions, said) if hasattr(self.module, "more") else {}

    @property
    def scale(self) -> float:
        return getattr(self.module, "SCALE", 100.0)

    @property
    def unit(self) -> str:
        return getattr(self.module, "UNIT", "%")

    @property
    def total(self) -> str:
        return getattr(self.module, "TOTAL", "mean")


# Names for --format: modules of this folder.
FORMATS = "own scenes llava minimind pope textvqa gqa mmbench scienceqa mme refcoco".split()


def format_of(name: str) -> Format:
    """The format of a name in FORMATS; UserError, with what is close to it, for another."""
    if name not in FORMATS:
        close = difflib.get_close_matches(name, FORMATS, n=3)
        meant = f"did you mean {' or '.join(close)}? " if close else ""
        raise UserError(
            f"no question format is called {name!r}; {meant}there are {', '.join(FORMATS)}"
        )
    return Format(name, importlib.import_module(f".{name}", __name__))


def _distinct(questions: Iterator[Question], bad: Bad) -> Iterator[Question]:
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            bad(f"question {question.id}", "another question has this id")
            continue
        seen.add(question.id)
        yield question
