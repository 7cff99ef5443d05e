"""Question formats: how question sets are read, and how responses are scored. Add formats here.

A format is one file of this folder. To add one, write `my_format.py` with

    def read(source: Source, bad: BadRecords) -> Iterator[Question]: ...
    def score(question: Question, response: str) -> float: ...  # 0 to 1

and a line in FORMATS below; `--format` takes the name from there. `gqa.py` is a short example.
`Format` lists what the file may have besides. The file's docstring says which published files it
reads and whose scoring rule it follows. docs/questions.md lists all.

Helpers, which are no formats: `records.py` (reading records from untrusted files), `prepared.py`
(LLaVA's prepared files), `shared_rules.py` (exact match, options with letters), `parquet.py`,
`caption_rules.py`, `vqa_normalise.py`, `plain_pickle.py` and `xlsx.py`.

A format is imported when it is first used. Nothing here imports MLX, so a question set can be read
without a model.
"""

import difflib
import importlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image

from ...checkpoints.errors import UserError
from ...inputs.video import DEFAULT_FPS, DEFAULT_MAX_FRAMES


@dataclass(frozen=True)
class ClipFile:
    """A video or a folder of frames, and which of its frames are taken."""

    path: Path
    fps: float = DEFAULT_FPS
    max_frames: int = DEFAULT_MAX_FRAMES


# A file, its bytes, drawn on demand, or a clip.
Picture = Path | bytes | Callable[[], Image.Image] | ClipFile
SENTENCE_TOKENS = 32  # the least length of a response that may hold the answer in a sentence

# From a name for --format to the file of this folder that reads it.
FORMATS = {
    "own": "json_lines",
    "scenes": "scenes",
    "scenes-large": "scenes_large",
    "pages": "pages",
    "pages-large": "pages_large",
    "llava": "llava",
    "minimind": "minimind",
    "pope": "pope",
    "textvqa": "textvqa",
    "gqa": "gqa",
    "mmbench": "mmbench",
    "scienceqa": "scienceqa",
    "mme": "mme",
    "refcoco": "refcoco",
    "vqav2": "vqav2",
    "mmmu": "mmmu",
    "mmvet": "mmvet",
    "mmbench-rows": "mmbench_rows",
    "llava-eval": "llava_eval",
    "captions": "captions",
}
# Names of question sets, too: drawn, not read.
DRAWN = ("scenes", "scenes-large", "pages", "pages-large")
# From how the name of one of LLaVA's prepared files begins to the format of its questions.
PREPARED = {
    "llava_pope": "pope",
    "llava_gqa": "gqa",
    "llava_mme": "mme",
    "llava_vqav2": "vqav2",
    "llava_textvqa": "textvqa",
    "llava_test_cqm-a": "scienceqa",
    "llava-mm-vet": "mmvet",
    "mmbench_": "mmbench-rows",
}


@dataclass(frozen=True)
class DrawnPicture:
    """A picture that is drawn when it is called for, and its name in a result."""

    name: str
    draw: Callable[[], Image.Image]

    def __call__(self) -> Image.Image:
        return self.draw()


@dataclass(frozen=True)
class Question:
    """One question about an image, or several.

    `answers` are the right ones. The log-probability of the first is measured. There is none where
    the authors keep the right answers to themselves.
    `image` is a path, the bytes of an image file, a function that draws the picture on demand, or a
    clip; `more_images` are those after it, of a question about several.
    Questions of one `group` are scored together (MME: two about an image; MMBench: one question
    with its options rotated). A question without a group stands alone.
    `scoring_data` is whatever else the format's `score` needs.
    `record` is what a file of answers says about the question (default: its id and its text).
    """

    id: str
    text: str
    answers: tuple[str, ...]
    image: Picture
    kind: str = "all"
    group: str = ""
    scoring_data: Any = None
    record: dict[str, Any] | None = None
    more_images: tuple[Path | bytes, ...] = ()


def have_clips(questions: Iterable[Question]) -> bool:
    """Is one of them about a clip?"""
    return any(isinstance(question.image, ClipFile) for question in questions)


@dataclass
class BadRecords:
    """Records that cannot be used. The first is an error; with `skip` all are listed instead."""

    skip: bool = False
    messages: list[str] = field(default_factory=list)

    def report(self, where: str, why: str) -> None:
        """Note one bad record, such as ("a.jsonl, line 3", "there is no answer").

        Raises UserError without `skip`.
        """
        if not self.skip:
            raise UserError(f"{where}: {why} (skip_bad leaves such questions out)")
        self.messages.append(f"{where}: {why}")


@dataclass(frozen=True)
class Source:
    """Where a question set lies: its file or folder, and the images' folder if it is another.

    `split` selects a part, for formats that have parts. `boxes` is the unit of coordinates, for
    formats whose answers are boxes: "unit" (0 to 1), "thousand" (0 to 1000) or "pixels".
    """

    path: Path
    images: Path | None = None
    split: str | None = None
    boxes: str = "unit"


def mean(scores: list[float]) -> float:
    """The score of a group, unless the format has a rule of its own."""
    return sum(scores) / len(scores)


@dataclass(frozen=True)
class Format:
    """A question format: a file of this folder, with defaults for what it leaves out.

    The file must have `read(source, bad)` and `score(question, response)`. It may have
    - `group_score(scores) -> float`: the score of a group of questions (default: the mean);
    - `SCALE`, `UNIT`: a kind's mean is multiplied by SCALE for display (default: 100, "%");
    - `TOTAL`: how kinds make up the overall figure: "mean" over all groups (default), or "sum"
      over the kinds;
    - `extra_figures(questions, responses, scores) -> dict[str, float]`: further figures that the
      format's authors report, in the unit in which they are shown (POPE: F1 and share of yes, in
      %), from the responses or from their scores;
    - `LEAST_TOKENS`: a response may be at least so long, if the user sets no limit (default: 32);
    - `upload(questions, responses, source) -> dict[str, bytes]`: files for the authors' evaluation
      or its server, from the end of a file's name to its content;
    - `grade_prompt(question, response, again)`, `parse_grade(text)`: for responses that a language
      model grades (`language_judge.py`). `grader` is then its grade; without one the questions are
      not scored.
    - `prepare_scoring(questions) -> list[Question]`: the questions with scoring data that depend on
      all of them (captions: document frequencies);
    - `figures_to_full(responses, full_responses) -> dict[str, float]`: what else compares a
      method's responses with those of the full model;
    - `METRIC`: the name of the overall figure, where it is no accuracy.
    """

    name: str
    module: ModuleType
    grader: Callable[[Question, str], float] | None = None

    def read(self, source: Source, bad: BadRecords) -> Iterator[Question]:
        """The questions one by one, with distinct ids; their images are not opened yet.

        Raises UserError at once for a missing file or folder, and on the way for a bad record
        unless `bad` skips those.
        """
        return _with_distinct_ids(self.module.read(source, bad), bad)

    def score(self, question: Question, response: str) -> float:
        """The score of a model's response, 0 to 1."""
        if self.grader:
            return self.grader(question, response)
        return self.module.score(question, response)

    def group_score(self, scores: list[float]) -> float:
        return getattr(self.module, "group_score", mean)(scores)

    def is_scored(self, questions: Iterable[Question]) -> bool:
        """Whether the right answers are there, and the grader too, if it needs one."""
        has_rule = self.grader is not None or not self.needs_grader
        return has_rule and all(question.answers for question in questions)

    def extra_figures(
        self, questions: list[Question], responses: list[str], scores: list[float]
    ) -> dict[str, float]:
        """The authors' further figures."""
        if not hasattr(self.module, "extra_figures"):
            return {}
        return self.module.extra_figures(questions, responses, scores)

    def upload(
        self, questions: list[Question], responses: list[str], source: Source
    ) -> dict[str, bytes]:
        """Files for the authors' evaluation: from the end of a file's name to its content."""
        if not hasattr(self.module, "upload"):
            return {}
        return self.module.upload(questions, responses, source)

    @property
    def needs_grader(self) -> bool:
        """Whether a language model grades the responses."""
        return hasattr(self.module, "grade_prompt")

    @property
    def least_tokens(self) -> int:
        return getattr(self.module, "LEAST_TOKENS", SENTENCE_TOKENS)

    def prepare_scoring(self, questions: list[Question]) -> list[Question]:
        return getattr(self.module, "prepare_scoring", list)(questions)

    def figures_to_full(self, responses: list[str], full: list[str]) -> dict[str, float]:
        if not hasattr(self.module, "figures_to_full"):
            return {}
        return self.module.figures_to_full(responses, full)

    @property
    def metric(self) -> str | None:
        return getattr(self.module, "METRIC", None)

    @property
    def scale(self) -> float:
        return getattr(self.module, "SCALE", 100.0)

    @property
    def unit(self) -> str:
        return getattr(self.module, "UNIT", "%")

    @property
    def total(self) -> str:
        return getattr(self.module, "TOTAL", "mean")


def format_of(name: str, path: Path | None = None) -> Format:
    """The format of a name in FORMATS. UserError, with similar names, for any other.

    For "llava-eval" the name of the questions' file tells the benchmark, if it is a known one.
    """
    if name == "llava-eval" and path:
        beginnings = [key for key in PREPARED if path.name.lower().startswith(key)]
        name = PREPARED[beginnings[0]] if beginnings else name
    if name not in FORMATS:
        similar = difflib.get_close_matches(name, FORMATS, n=3)
        suggestion = f"did you mean {' or '.join(similar)}? " if similar else ""
        raise UserError(
            f"no question format is called {name!r}; {suggestion}there are {', '.join(FORMATS)}"
        )
    return Format(name, importlib.import_module(f".{FORMATS[name]}", __name__))


def _with_distinct_ids(questions: Iterator[Question], bad: BadRecords) -> Iterator[Question]:
    ids: set[str] = set()
    for question in questions:
        if question.id in ids:
            bad.report(f"question {question.id}", "another question has this id")
            continue
        ids.add(question.id)
        yield question
