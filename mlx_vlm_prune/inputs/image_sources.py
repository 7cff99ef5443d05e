"""Where an image may come from: a path, bytes, an open file, a data URI, Pillow or numpy.

A URL is one only where a caller allows it (`image_urls.py`).
"""

import base64
import binascii
import io
import os
import re
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, unquote_to_bytes

import numpy as np
from PIL import Image

from ..checkpoints.errors import UserError, short

KINDS_OF_SOURCE = (
    "a path, a data URI, a file's bytes, an open file, a Pillow image or a numpy array (H, W, 3)"
)
DATA_URI = "data:"
URLS = ("http:", "https:")
URL_LETTERS = "!#$%&'()*+,/:;=?@[]~"  # that stay as they are, beside letters and digits
LONGEST_NAME = 80  # of a URL in a sentence
SPARE_BYTES = 1 << 24  # of a file, beside the bytes of its pixels
PIECE = 1 << 24  # bytes of an open file that are read at once

ImageSource = (
    str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | Image.Image | np.ndarray
)


class NamedBytes(bytes):
    """The bytes of a file, and what a sentence calls it."""

    name: str

    def __new__(cls, content: bytes, name: str) -> "NamedBytes":
        named = super().__new__(cls, content)
        named.name = name
        return named


def is_url(source: Any) -> bool:
    """Is it the text of an http or https URL?"""
    return isinstance(source, str) and source.lower().startswith(URLS)


def url_name(url: str) -> str:
    """What a sentence calls a URL: without its query and password, which may be secret."""
    plain = re.sub("//[^/@]*@", "//", re.split("[?#]", url)[0])
    text = quote(plain, safe=URL_LETTERS)
    return text if len(text) <= LONGEST_NAME else f"{text[: LONGEST_NAME - 3]}..."


def is_source(value: Any) -> bool:
    """Is it one image, and not several or none?"""
    if isinstance(value, np.ndarray):
        return value.dtype.kind not in "OSU"  # a list of paths
    kinds = str | os.PathLike | bytes | bytearray | memoryview | Image.Image
    return isinstance(value, kinds) or hasattr(value, "read")


def source_name(source: ImageSource) -> str:
    """What a sentence calls it."""
    if isinstance(source, str) and source.startswith(DATA_URI):
        return "the data URI"
    if is_url(source):
        return url_name(str(source))
    if isinstance(source, NamedBytes):
        return source.name
    return os.fspath(source) if isinstance(source, str | os.PathLike) else "the image"


def file_bytes(source: Any, name: str, most: int) -> bytes:
    """The bytes of what is no picture in memory yet; of a file, at most so many."""
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source)
    if hasattr(source, "read"):
        return read_open_file(source, most)
    if not isinstance(source, str | os.PathLike):
        raise UserError(f"an image is {short(source)}; give {KINDS_OF_SOURCE}")
    if name == "the data URI":
        return _data_of_uri(str(source))
    if is_url(source):
        raise UserError(f"{name} is a URL; download the image and give its path")
    return _read(source, name, most)


def most_bytes(pixels: int) -> int:
    """Of a file, that are read where an image may have so many pixels."""
    return 8 * pixels + SPARE_BYTES


def read_open_file(file: Any, most: int) -> bytes:
    """All bytes of an open file or a BytesIO, which then stands where it stood; of a stream that
    cannot go back, those that are left. Raises UserError for a closed or a text file, and for one
    of more than `most` bytes."""
    if isinstance(file, io.TextIOBase):
        raise UserError("the image's file is open as text; open it with mode 'rb'")
    try:
        if not getattr(file, "seekable", bool)():
            return _read_up_to(file, most)
        place = file.tell()
        file.seek(0)
        try:
            return _read_up_to(file, most)
        finally:
            file.seek(place)
    except UserError:
        raise
    except (OSError, ValueError, TypeError) as problem:
        raise UserError(f"cannot read the image's open file: {problem}") from problem


def _read_up_to(file: Any, most: int) -> bytes:
    """What is left of an open file. Raises UserError where that is more than `most` bytes."""
    parts, size = [], 0
    while part := file.read(min(PIECE, most + 1 - size)):  # a stream may give less than that
        if not isinstance(part, bytes):
            raise UserError(f"an image's open file gave {short(part)} in place of bytes")
        parts.append(part)
        size += len(part)
        if size > most:
            raise UserError(
                f"the image's open file has more than {most} bytes; of an image at most {most} are"
                " read"
            )
    return b"".join(parts)


def _data_of_uri(uri: str) -> bytes:
    head, comma, body = uri.partition(",")
    try:
        if not comma:
            raise ValueError("there is no comma")
        data = unquote_to_bytes(body)
        if not head.lower().endswith(";base64"):
            return data
        return base64.b64decode(b"".join(data.split()), validate=True)
    except (binascii.Error, ValueError) as problem:
        raise UserError(f"the data URI is damaged: {problem}") from problem


def check_is_file(source: ImageSource) -> None:
    """Raises UserError for a path that is no file; other sources pass."""
    if not isinstance(source, str | os.PathLike) or is_url(source):
        return
    name = source_name(source)
    if name == "the data URI":
        return
    if not os.path.exists(source):
        raise UserError(f"there is no image file {name}")
    if os.path.isdir(source):
        raise UserError(f"{name} is a directory, not an image file")
    if not os.path.isfile(source):  # a pipe or a device may never end
        raise UserError(f"{name} is not a regular file")


def _read(path: str | os.PathLike[str], name: str, most: int) -> bytes:
    check_is_file(path)
    if (size := os.path.getsize(path)) > most:
        raise UserError(f"{name} has {size} bytes; of an image at most {most} are read")
    try:
        return Path(path).read_bytes()
    except OSError as problem:
        raise UserError(f"cannot read {name}: {problem.strerror}") from problem
