"""A user's own questions (`--format own`): JSON lines, or a folder with `questions.jsonl`.

A line holds `image` (a path, relative to the images' folder or else to the file), `question` and
`answer` (a text, or a list of texts that are all right). It may hold `kind` and `id`:

    {"image": "a.png", "question": "What colour is the star?", "answer": ["grey", "gray"]}

In place of an image it may hold a `video` (a file, or a folder of frames), with `fps` (2) and
`max_frames` (32), for a model that reads one:

    {"video": "a.mp4", "fps": 1, "question": "What falls?", "answer": "a cup"}

A response is right when it equals one of the answers, except for case, white space and a final
full stop.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...checkpoints.errors import UserError
from ...inputs.video import check_frame_options
from . import BadRecords, ClipFile, Question, Source
from .records import (
    RecordError,
    existing_file,
    image_file,
    image_folder,
    media_file,
    numbered_lines,
    optional_field,
    parse_object,
    questions_from,
    text_field,
    text_list_field,
)
from .shared_rules import exact_match as score

__all__ = ["read", "score"]

LEAST_TOKENS = 0  # a response must equal the answer, so a sentence is of no use


def read(source: Source, bad: BadRecords) -> Iterator[Question]:
    """The questions of a file or folder. Raises UserError where either is missing."""
    inside = source.path / "questions.jsonl"
    path = existing_file(inside if source.path.is_dir() else source.path)
    images = image_folder(Source(path, source.images))
    numbered = ((where, (n, line)) for n, (where, line) in enumerate(numbered_lines(path), 1))
    return questions_from(numbered, lambda record: [_question(*record, images)], bad)


def _question(number: int, line: bytes, images: Path) -> Question:
    record: dict[str, Any] = parse_object(line)
    has_list = isinstance(record.get("answer"), list)
    answers = text_list_field(record, "answer") if has_list else [text_field(record, "answer")]
    return Question(
        id=optional_field(record, "id", f"{number}"),
        text=text_field(record, "question"),
        answers=tuple(answers),
        image=_seen(record, images),
        kind=optional_field(record, "kind", "all"),
    )


def _seen(record: dict[str, Any], images: Path) -> Path | ClipFile:
    """What the question is about."""
    names = [name for name in ("image", "video") if record.get(name) is not None]
    if len(names) != 1:
        raise RecordError("there is no image and no video" if not names else "it has an image and a"
                          " video; a question is about one of them")  # fmt: skip
    if names == ["video"]:
        return _clip(record, images)
    return image_file(images, text_field(record, "image"))


def _clip(record: dict[str, Any], images: Path) -> ClipFile:
    path = media_file(images, text_field(record, "video"), "video", may_be_folder=True)
    named = ((name, record.get(name)) for name in ("fps", "max_frames"))
    clip = ClipFile(path, **{name: value for name, value in named if value is not None})
    try:
        check_frame_options(clip.fps, clip.max_frames)
    except UserError as fault:
        raise RecordError(str(fault)) from None
    return clip
