"""A question set that can be read again and again, and its fingerprint."""

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from ..checkpoints.errors import UserError
from ..inputs.video import pictures_of
from .judge import check_kinds
from .questions import BadRecords, ClipFile, Format, Question


@dataclass(frozen=True)
class QuestionSet:
    """Questions of one format. `read_source` yields all of them, each time it is called."""

    name: str
    format: Format
    read_source: Callable[[BadRecords], Iterator[Question]]
    limit: int | None = None
    skip_bad: bool = False

    def read(self, bad: BadRecords) -> Iterator[Question]:
        """The questions up to the limit; the group at the limit is completed."""
        last_group = ""
        for n, question in enumerate(self.read_source(bad)):
            in_last_group = question.group and question.group == last_group
            if self.limit is not None and n >= self.limit and not in_last_group:
                return
            last_group = question.group
            yield question

    def has_more(self, count: int) -> bool:
        """Whether there are more than `count` questions without the limit."""
        return any(True for _ in islice(self.read_source(BadRecords(skip=True)), count, None))

    def load(self) -> tuple[list[Question], list[str]]:
        """All questions, and messages on those left out. Images in memory become digests."""
        bad = BadRecords(self.skip_bad)
        bar = tqdm(self.read(bad), desc="reading questions", file=sys.stderr, delay=2, leave=False)
        questions = [_with_image_digest(question) for question in bar]
        if not questions:
            raise UserError(f"{self.name} holds no question")
        check_kinds(question.kind for question in questions)
        return self.format.prepare_scoring(questions), bad.messages


def _with_image_digest(question: Question) -> Question:
    """The question; image bytes are replaced by their SHA-256, to save memory."""
    image = _digest(question.image) if isinstance(question.image, bytes) else question.image
    more = [_digest(one) if isinstance(one, bytes) else one for one in question.more_images]
    return replace(question, image=image, more_images=tuple(more))


def _digest(image: bytes) -> bytes:
    return hashlib.sha256(image).digest()


def fingerprint(questions: Iterable[Question]) -> str:
    """A digest of the questions and their images: of a file its name, size and time of change."""
    digest = hashlib.sha256()
    for q in questions:
        images = [_identity(image) for image in (q.image, *q.more_images)]
        fields = (q.id, q.text, q.answers, q.kind, q.group, q.scoring_data, *images)
        digest.update(repr(fields).encode())
    return digest.hexdigest()


def _identity(image: object) -> object:
    if isinstance(image, ClipFile):
        is_folder = image.path.is_dir()
        files = pictures_of(image.path) if is_folder else [image.path]
        return [*map(_identity, files)], image.fps, image.max_frames
    if isinstance(image, Path) and image.exists():
        stat = image.stat()
        return image.name, stat.st_size, stat.st_mtime_ns
    return image if isinstance(image, bytes) else ""
