"""POPE, polling for objects that are not there (arXiv:2305.10355): yes or no.

Read are the published JSON lines: `question_id`, `image`, `text`, `label`. A folder stands for
all its `*pope*.json` files; the kind is what follows "pope_" in a file's name (random, popular,
adversarial), or a line's own `category`. The question gets the field's suffix for short
answers, which the authors' own prompt has not.

The authors' rule, kept: of the answer's first sentence, without commas, if a word is "No",
"no" or "not", it means no; anything else means yes, an empty answer too. (They part words at
blanks only, we at any white space.) Beside accuracy they report precision, recall and F1 of
yes, and the share of yes. Where a figure divides by nothing their script fails; here it is 0.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from ...checkpoints.errors import UserError
from . import Bad, Question, Source
from .answers import ONE_WORD
from .reading import (
    Fault,
    each,
    existing,
    folder,
    image_file,
    lines,
    name_of,
    optional,
    parse,
    text_of,
)

WORDS_OF_NO = {"No", "no", "not"}


def read(source: Source, bad: Bad) -> Iterator[Question]:
    """The questions of a file or folder. Raises UserError where either is missing."""
    paths = sorted(source.path.glob("*pope*.json*")) if source.path.is_dir() else [source.path]
    if not paths:
        raise UserError(f"{source.path} holds no file such as coco_pope_random.json")
    inside = source.path if source.path.is_dir() else source.path.parent
    home = folder(source.images or inside)
    return _questions([existing(path) for path in paths], home, bad)


def _questions(paths: list[Path], home: Path, bad: Bad) -> Iterator[Question]:
    for path in paths:
        make = partial(_question, path.stem.partition("pope_")[2] or "all", home)
        yield from each(lines(path), make, bad)


def _question(kind: str, home: Path, raw: bytes) -> list[Question]:
    record = parse(raw)
    label = text_of(record, "label").lower()
    if label not in ("yes", "no"):
        raise Fault(f"label is {label[:40]!r}; it is yes or no")
    kind = optional(record, "category", kind)
    question = Question(
        id=f"{kind}-{name_of(record, 'question_id')}",
        text=f"{text_of(record, 'text')}\n{ONE_WORD}",
        answers=(label,),
        image=image_file(home, text_of(record, "image")),
        kind=kind,
    )
    return [question]


def meant(said: str) -> str:
    """ "yes" or "no", by the authors' rule."""
    words = said.split(".")[0].replace(",", "").split()
    return "no" if WORDS_OF_NO & set(words) else "yes"


def score(question: Question, said: str) -> float:
    """1 where the answer means the label, else 0."""
    return float(meant(said) == question.answers[0])


def more(questions: list[Question], said: list[str]) -> dict[str, float]:
    """Accuracy, precision, recall, F1 and the share of yes, in %."""
    pairs = [(q.answers[0], meant(answer)) for q, answer in zip(questions, said, strict=True)]
    hits = pairs.count(("yes", "yes"))
    claimed = sum(answer == "yes" for _, answer in pairs)
    there = sum(label == "yes" for label, _ in pairs)
    right = sum(label == answer for label, answer in pairs)
    return {
        "accuracy": _percent(right, len(pairs)),
        "precision": _percent(hits, claimed),
        "recall": _percent(hits, there),
        "F1": _percent(2 * hits, claimed + there),
        "share of yes": _percent(claimed, len(pairs)),
    }


def _percent(part: int, whole: int) -> float:
    return 100 * part / whole if whole else 0.0
