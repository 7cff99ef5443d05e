"""What the readers of question files share: files of strangers, taken apart piece by piece.

A reader raises Fault for what is wrong with one record; `each` hands it on to Bad with the
place. What is wrong with the whole file or folder is a UserError, before the first question.
"""

import errno
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from ...checkpoints.errors import UserError
from ...checkpoints.reading.files import parse_json, read_json
from . import Bad, Question, Source

ENCODING = "utf-8-sig"  # some editors begin a file with a mark
LONGEST_LINE = 1 << 26  # bytes; a picture in base64 fits, and a file without line ends does not
LONGEST_NAME = 4096
NOTHING: tuple[Question, ...] = ()  # of a record that asks nothing about a picture
R = TypeVar("R")


class Fault(ValueError):
    """What is wrong with one record, in a few words."""


def each(
    records: Iterable[tuple[str, R]], make: Callable[[R], Iterable[Question]], bad: Bad
) -> Iterator[Question]:
    """The questions of every (place, record); a record at fault goes to `bad` as a whole."""
    for where, record in records:
        try:
            questions = list(make(record))
        except Fault as fault:
            bad(where, str(fault))
            continue
        yield from questions


def lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """The lines of a file that are not blank, each with its place."""
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(LONGEST_LINE + 1):
            number += 1
            if len(raw) > LONGEST_LINE:
                raise UserError(f"{path}, line {number} is longer than {LONGEST_LINE >> 20} MB")
            if raw.strip():
                yield f"{path}, line {number}", raw


def each_entry(
    source: Source, bad: Bad, listed: dict[str, Any] | list[Any],
    make: Callable[[str, dict[str, Any], Path], Iterable[Question]],
) -> Iterator[Question]:  # fmt: skip
    """The questions of every entry of a JSON object or list, by its name or number.

    Raises UserError where the images' folder is missing.
    """
    home, what = images_of(source), "question" if isinstance(listed, dict) else "record"
    named = listed.items() if isinstance(listed, dict) else enumerate(listed, 1)
    entries = ((f"{source.path}, {what} {name}", (f"{name}", one)) for name, one in named)
    return each(entries, lambda entry: make(entry[0], object_of(entry[1]), home), bad)


def parse(raw: bytes | str) -> dict[str, Any]:
    """The JSON object that a line holds; Fault where there is none."""
    return object_of(parse_any(raw))


def object_of(value: Any) -> dict[str, Any]:
    """A JSON value that must be an object."""
    if not isinstance(value, dict):
        raise Fault("this is not a JSON object")
    return value


def parse_any(raw: bytes | str) -> Any:
    """The JSON value of a text; Fault where it is none, or nested beyond reason."""
    try:
        return parse_json(raw, ENCODING)
    except ValueError as e:
        raise Fault(f"this {e}") from None


def whole_json(path: Path, kind: type) -> Any:
    """What a JSON file holds, an object (`dict`) or a list; UserError otherwise."""
    return read_json(existing(path), kind, ENCODING)


def existing(path: Path) -> Path:
    """The path, if it is a file that can be read; UserError otherwise."""
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a file of questions")
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        path.open("rb").close()
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    return path


def folder(path: Path) -> Path:
    """The path, if it is a folder; UserError otherwise."""
    if not path.is_dir():
        raise UserError(f"there is no folder {path}")
    return path


def images_of(source: Source) -> Path:
    """The images' folder: the one that was named, or the one in which the questions lie."""
    return folder(source.images if source.images else source.path.parent)


def text_of(record: dict[str, Any], key: str) -> str:
    """A text that must be there and say something."""
    value = record.get(key)
    if value is None:
        raise Fault(f"there is no {key}")
    if not isinstance(value, str):
        raise Fault(f"{key} is {_kind(value)}, not a text")
    if not value.strip():
        raise Fault(f"{key} is empty")
    return value.strip()


def texts_of(record: dict[str, Any], key: str) -> list[str]:
    """A list of texts that must be there and not be empty."""
    value = record.get(key)
    if value is None:
        raise Fault(f"there is no {key}")
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise Fault(f"{key} is not a list of texts")
    if not value:
        raise Fault(f"{key} is empty")
    return value


def name_of(record: dict[str, Any], key: str) -> str:
    """An identifier, which is a text or a whole number."""
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise Fault(f"there is no {key}" if value in (None, "") else f"{key} is not an identifier")
    return str(value)


def optional(record: dict[str, Any], key: str, otherwise: str) -> str:
    """A text or a whole number that may be absent."""
    return otherwise if record.get(key) in (None, "") else name_of(record, key)


def image_file(home: Path, name: str) -> Path:
    """The image of one question; Fault where there is no such file."""
    odd, there = len(name) > LONGEST_NAME or any(ord(one) < 32 for one in name), False
    try:
        # Not is_file, which from Python 3.14 on says no to a name that cannot be.
        there = not odd and stat.S_ISREG((home / name).stat().st_mode)
    except OSError as e:
        odd = e.errno == errno.ENAMETOOLONG
    except ValueError:  # what no file system can spell
        odd = True
    if odd:
        raise Fault(f"{name[:80]!r} is not the name of an image file")
    if not there:
        raise Fault(f"there is no image file {home / name}")
    return home / name


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", bool: "a truth value"}
    return names.get(type(value), "a number")
