"""Promises about where an image may come from, and what of a file Pillow only warns of.

Shapes: H height, W width of a picture.
"""

import base64
import io
import os
import struct
import threading
import urllib.parse
import warnings
import zlib
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_vlm_prune import Chat, batch_generate, generate, load
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.generation.request import list_images
from mlx_vlm_prune.inputs import image
from mlx_vlm_prune.inputs.image import open_image
from mlx_vlm_prune.inputs.image_sources import read_open_file

from .test_image import encoded, noise

# Files that a test opens are closed when they are freed.
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
QUESTION = "Is there a red star?"


@pytest.fixture(scope="module")
def scenes():
    """The built-in model and its processor."""
    return load()


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sources") / "a.png"
    path.write_bytes(encoded(Image.fromarray(noise())))
    return path


def at(data: bytes, place: int) -> io.BytesIO:
    stream = io.BytesIO(data)
    stream.seek(place)
    return stream


class Download(io.RawIOBase):
    """A stream that cannot go back, as an answer of an HTTP server."""

    def __init__(self, data: bytes):
        self.rest = data

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        """A kilobyte at a time, as it comes."""
        data, self.rest = self.rest[:1024], self.rest[1024:]
        buffer[: len(data)] = data
        return len(data)


class Endless(Download):
    """A server that never ends; what was taken of it is counted."""

    def __init__(self) -> None:
        self.taken = 0

    def readinto(self, buffer: memoryview) -> int:
        self.taken += len(buffer)
        return len(buffer)


class WithoutSize:
    def read(self) -> bytes:
        return b""


SOURCES = {
    "path": lambda file: file,
    "text": str,
    "bytes": Path.read_bytes,
    "bytearray": lambda file: bytearray(file.read_bytes()),
    "memoryview": lambda file: memoryview(file.read_bytes()),
    "BytesIO": lambda file: io.BytesIO(file.read_bytes()),
    "BytesIO in the middle": lambda file: at(file.read_bytes(), 20),
    "BytesIO at its end": lambda file: at(file.read_bytes(), os.path.getsize(file)),
    "open file": lambda file: file.open("rb"),
    "stream": lambda file: Download(file.read_bytes()),
    "Pillow": Image.open,
    "numpy": lambda file: np.asarray(Image.open(file)),
    "numpy, not in a row": lambda file: np.asfortranarray(np.asarray(Image.open(file))),
    "data URI": lambda file: "data:image/png;base64,"
    + base64.b64encode(file.read_bytes()).decode(),
    "data URI in lines": lambda file: "data:image/png;base64,"
    + base64.encodebytes(file.read_bytes()).decode(),
    "data URI, quoted": lambda file: "data:image/png,"
    + urllib.parse.quote_from_bytes(file.read_bytes()),
}  # fmt: skip


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_gives_the_same_picture(file, kind):
    make = SOURCES[kind]
    for opened in (open_image(make(file)), open_image(list_images(make(file))[0])):
        np.testing.assert_array_equal(np.asarray(opened), noise())
    assert len(list_images([make(file), file])) == 2


@pytest.mark.parametrize("kind", ["BytesIO at its end", "open file", "numpy", "data URI"])
def test_every_way_in_takes_it(scenes, file, kind):
    model, processor = scenes
    source, options = SOURCES[kind](file), {"max_tokens": 2}
    expected = generate(model, processor, QUESTION, file, **options)
    chat = Chat(model, processor, **options)
    for answer in (
        generate(model, processor, QUESTION, source, **options),
        *batch_generate(model, processor, [QUESTION] * 2, [source, [source]], **options),
        chat.ask(QUESTION, source),
    ):
        assert answer.visual_tokens == model.N
        assert answer.token_ids == expected.token_ids


def test_an_open_file_stands_where_it_stood(file):
    stream = at(file.read_bytes(), 20)
    open_image(stream)
    list_images(stream)
    assert stream.tell() == 20


def test_no_more_is_read_of_an_open_file_than_its_image_may_have(scenes):
    for way in (
        lambda stream: open_image(stream, max_pixels=10_000_000),
        lambda stream: generate(*scenes, QUESTION, stream, max_pixels=10_000_000),
        lambda stream: batch_generate(*scenes, [QUESTION], [stream], max_pixels=10_000_000),
        lambda stream: Chat(*scenes, max_pixels=10_000_000).ask(QUESTION, stream),
    ):
        stream = Endless()
        with pytest.raises(UserError, match=r"more than 96777216 bytes; of an image at most"):
            way(stream)
        assert stream.taken == 96777217


def test_an_open_file_that_is_too_large_stands_where_it_stood_too(file):
    stream = at(file.read_bytes(), 20)
    with pytest.raises(UserError, match="more than 10 bytes"):
        read_open_file(stream, 10)
    assert stream.tell() == 20


def closed(file: Path) -> io.BytesIO:
    stream = io.BytesIO(file.read_bytes())
    stream.close()
    return stream


REFUSED = {
    "URL": (lambda file: "https://example.org/a?k=1", "https://example.org/a is a URL; set allow"),
    "mapping": (lambda file: {"path": str(file)}, "; give a path, a data URI, a file's bytes"),
    "number": (lambda file: 3, "an image is 3; give a path, a data URI, a file's bytes"),
    "long": (lambda file: {"bytes": file.read_bytes()}, "an image is of type dict; give a path"),
    "mlx": (lambda file: mx.zeros((4, 4, 3), mx.uint8), "an image is of type array; give a path"),
    "floats": (lambda file: noise() / 255, "a numpy array (70, 90, 3) of float64; give (H, W, 3)"),
    "grey": (lambda file: noise()[..., 0], "a numpy array (70, 90) of uint8; give (H, W, 3)"),
    "stack": (lambda file: noise()[None], "a numpy array (1, 70, 90, 3) of uint8; give (H, W, 3)"),
    "channels first": (lambda file: noise().transpose(2, 0, 1), "(3, 70, 90) of uint8; give"),
    "nothing": (lambda file: noise()[:0], "has no pixels (90 x 0)"),
    "bomb": (lambda file: np.broadcast_to(np.uint8(0), (9000, 9000, 3)), "megapixels allowed"),
    "text file": (lambda file: file.open(), "open as text; open it with mode 'rb'"),
    "StringIO": (lambda file: io.StringIO("a"), "open as text; open it with mode 'rb'"),
    "closed": (closed, "cannot read the image's open file: I/O operation on closed file"),
    "read out": (lambda file: Download(b""), "the image is empty"),
    "endless": (lambda file: Endless(), "the image's open file has more than 216777216 bytes; of"),
    "all at once": (lambda file: WithoutSize(), "cannot read the image's open file: "),
    "empty URI": (lambda file: "data:image/png;base64,", "the data URI is empty"),
    "no comma": (lambda file: "data:image/png;base64", "the data URI is damaged: there is no comm"),
    "no base64": (lambda file: "data:;base64,a!b", "the data URI is damaged: "),
    "no image": (lambda file: "data:,hello", "the data URI is not a PNG, JPEG"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_everything_else_is_one_short_sentence(scenes, file, kind):
    make, sentence = REFUSED[kind]
    for of_request in (lambda: make(file), lambda: [file, make(file)]):
        with pytest.raises(UserError) as caught:
            generate(*scenes, QUESTION, of_request(), max_tokens=1)
        text = str(caught.value)
        assert sentence in text and len(text) < 200 and "\n" not in text


def jpeg_with(marker: bytes, payload: bytes) -> bytes:
    """A JPEG with one more segment behind its start."""
    data = encoded(Image.fromarray(noise()), "JPEG")
    return data[:2] + marker + struct.pack(">H", 2 + len(payload)) + payload + data[2:]


def bad_exif() -> bytes:
    """An entry whose 64 characters lie behind the end of the block."""
    entry = struct.pack("<HHII", 270, 2, 64, 9999)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + entry + bytes(4)
    return jpeg_with(b"\xff\xe1", exif)


def broken_mpf() -> bytes:
    """An index of two pictures whose entries are missing."""
    count = struct.pack("<HHII", 0xB001, 4, 1, 2)
    entries = struct.pack("<HHII", 0xB002, 7, 32, 9999)
    index = b"MPF\0II*\0" + struct.pack("<IH", 8, 2) + count + entries + bytes(4)
    return jpeg_with(b"\xff\xe2", index)


def apng_without_frames() -> bytes:
    data = encoded(Image.fromarray(noise()))
    chunk = b"acTL" + struct.pack(">II", 0, 0)
    whole = struct.pack(">I", 8) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return data[:33] + whole + data[33:]  # behind the header


@pytest.mark.parametrize("make", [bad_exif, broken_mpf, apng_without_frames])
def test_what_pillow_only_warns_of_is_read_as_pillow_reads_it_and_untouched_elsewhere(make):
    data = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = np.asarray(open_image(data))
    with pytest.warns(UserWarning), Image.open(io.BytesIO(data)) as opened:
        opened.getexif()
        np.testing.assert_array_equal(got, np.asarray(opened.convert("RGB")))


def test_images_that_are_opened_at_once_leave_the_warnings_as_they_were(monkeypatch):
    """The first thread ends before the second warns, and the second ends last."""
    entered, first_done = threading.Barrier(2), threading.Event()
    problems: list[Exception] = []

    def warn(source: str, name: str, most: int) -> Image.Image:
        entered.wait(9)
        if source == "second":
            first_done.wait(9)
        warnings.warn_explicit("a bad entry", UserWarning, "x.py", 1, module="PIL.PngImagePlugin")
        return Image.new("RGB", (1, 1))

    def open_it(source: str) -> None:
        try:
            open_image(source)
        except Exception as problem:
            problems.append(problem)
        if source == "first":
            first_done.set()

    monkeypatch.setattr(image, "_decode", warn)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = [*warnings.filters]
        threads = [threading.Thread(target=open_it, args=(name,)) for name in ("first", "second")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(9)
        assert not problems and warnings.filters == before
