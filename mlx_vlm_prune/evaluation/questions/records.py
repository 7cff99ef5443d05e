"""Reading records from untrusted question files, for all formats.

A format raises RecordError for a fault of one record; `questions_from` reports it to BadRecords
with the place. A fault of a whole file or folder is a UserError, before the first question.
"""

import errno
import logging
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from ...checkpoints.errors import UserError
from ...checkpoints.reading.files import parse_json, read_json
from ...inputs.image_sources import is_url, url_name
from . import BadRecords, Question, Source

ENCODING = "utf-8-sig"  # some editors write a byte order mark
LONGEST_LINE = 1 << 26  # bytes; a picture in base64 fits, and a file without line ends does not
LARGE = 1 << 25  # bytes of JSON that take a second or more
LONGEST_NAME = 4096
NO_QUESTIONS: tuple[Question, ...] = ()  # of a record without an image
R = TypeVar("R")
logger = logging.getLogger("mlx_vlm_prune")


class RecordError(ValueError):
    """A fault of one record, in a few words."""


def questions_from(
    records: Iterable[tuple[str, R]], make: Callable[[R], Iterable[Question]], bad: BadRecords
) -> Iterator[Question]:
    """The questions of every (place, record). A record with a fault is reported as a whole."""
    for where, record in records:
        try:
            questions = list(make(record))
        except RecordError as fault:
            bad.report(where, str(fault))
            continue
        yield from questions


def numbered_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """The lines of a file that are not blank, each with its place in words."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            if len(line) > LONGEST_LINE:
                raise UserError(f"{path}, line {number} is longer than {LONGEST_LINE >> 20} MB")
            if line.strip():
                yield f"{path}, line {number}", line


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines. Raises UserError for any other line."""
    for where, line in numbered_lines(path):
        try:
            yield parse_object(line)
        except RecordError as fault:
            raise UserError(f"{where}: {fault}") from None


def questions_from_json(
    source: Source, bad: BadRecords, records: dict[str, Any] | list[Any],
    make: Callable[[str, dict[str, Any], Path], Iterable[Question]],
) -> Iterator[Question]:  # fmt: skip
    """The questions of every record of a JSON object or list.

    `make` gets a record's name or number, the record and the images' folder. Raises UserError
    where that folder is missing.
    """
    images = image_folder(source)
    is_object = isinstance(records, dict)
    named = records.items() if isinstance(records, dict) else enumerate(records, 1)
    placed = (
        (f"{source.path}, {'question' if is_object else 'record'} {name}", (f"{name}", record))
        for name, record in named
    )
    return questions_from(placed, lambda pair: make(pair[0], as_object(pair[1]), images), bad)


def parse_object(text: bytes | str) -> dict[str, Any]:
    """The JSON object of a text. Raises RecordError for any other text."""
    return as_object(parse_value(text))


def as_object(value: Any) -> dict[str, Any]:
    """The value, if it is a JSON object. Raises RecordError otherwise."""
    if not isinstance(value, dict):
        raise RecordError("this is not a JSON object")
    return value


def parse_value(text: bytes | str) -> Any:
    """The JSON value of a text. Raises RecordError for any other text, or one nested too deeply."""
    try:
        return parse_json(text, ENCODING)
    except ValueError as e:
        raise RecordError(f"this {e}") from None


def load_json(path: Path, kind: type) -> Any:
    """The content of a JSON file, an object (`dict`) or a `list`. Raises UserError otherwise."""
    if existing_file(path).stat().st_size > LARGE:
        logger.info("reading %s (%d MB)", path, path.stat().st_size >> 20)
    return read_json(path, kind, ENCODING, None)


def existing_file(path: Path) -> Path:
    """The path, if it is a readable file. Raises UserError otherwise."""
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a file of questions")
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        path.open("rb").close()
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    return path


def existing_folder(path: Path) -> Path:
    """The path, if it is a folder. Raises UserError otherwise."""
    if not path.is_dir():
        raise UserError(f"there is no folder {path}")
    return path


def image_folder(source: Source) -> Path:
    """The images' folder: the source's, or else the folder of the question file."""
    return existing_folder(source.images if source.images else source.path.parent)


def text_field(record: dict[str, Any], key: str) -> str:
    """A required text that is not blank, stripped. Raises RecordError."""
    value = record.get(key)
    if value is None:
        raise RecordError(f"there is no {key}")
    if not isinstance(value, str):
        raise RecordError(f"{key} is {_type_name(value)}, not a text")
    if not value.strip():
        raise RecordError(f"{key} is empty")
    return value.strip()


def text_list_field(record: dict[str, Any], key: str) -> list[str]:
    """A required list of at least one text. Raises RecordError."""
    value = record.get(key)
    if value is None:
        raise RecordError(f"there is no {key}")
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise RecordError(f"{key} is not a list of texts")
    if not value:
        raise RecordError(f"{key} is empty")
    return value


def id_field(record: dict[str, Any], key: str) -> str:
    """A required identifier: a text or a whole number. Raises RecordError."""
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        missing = value in (None, "")
        raise RecordError(f"there is no {key}" if missing else f"{key} is not an identifier")
    return str(value)


def optional_field(record: dict[str, Any], key: str, default: str) -> str:
    """A text or a whole number that may be absent. Raises RecordError."""
    return default if record.get(key) in (None, "") else id_field(record, key)


def image_file(folder: Path, name: str) -> Path:
    """The path of a question's image. Raises RecordError where there is no such file."""
    return media_file(folder, name, "image")


def media_file(folder: Path, name: str, kind: str, *, may_be_folder: bool = False) -> Path:
    """The path of a question's image or video. Raises RecordError where there is none."""
    if is_url(name):
        raise RecordError(f"{url_name(name)} is a URL; download the {kind} and give its path")
    is_invalid = len(name) > LONGEST_NAME or any(ord(letter) < 32 for letter in name)
    is_there = False
    try:
        if not is_invalid:
            # Not Path.is_file, which from Python 3.14 on returns False for an invalid name.
            mode = (folder / name).stat().st_mode
            is_there = stat.S_ISREG(mode) or (may_be_folder and stat.S_ISDIR(mode))
    except OSError as e:
        is_invalid = e.errno == errno.ENAMETOOLONG
    except ValueError:  # characters that no file system allows
        is_invalid = True
    if is_invalid:
        raise RecordError(
            f"{name[:80]!r} is not the name of a{'n' * (kind == 'image')} {kind} file"
        )
    if not is_there:
        more = " or folder" if may_be_folder else ""
        raise RecordError(f"there is no {kind} file{more} {folder / name}")
    return folder / name


def _type_name(value: Any) -> str:
    names = {dict: "an object", list: "a list", bool: "a truth value"}
    return names.get(type(value), "a number")
