"""Image files as strangers make them: what would keep Pillow busy for minutes is found beforehand.

A few bytes may order a thousand passes over a picture, or a hundred thousand blocks that are each
read in Python. Here they are counted, and what says nothing of the pixels is left out.
"""

import re
import struct
from dataclasses import dataclass

from ..checkpoints.errors import UserError
from .exif import tiff_fault

MARKER = re.compile(rb"\xff([^\x00\x01\xff\xd0-\xd7])", re.DOTALL)
START_OF_IMAGE, END_OF_IMAGE, START_OF_SCAN = 0xD8, 0xD9, 0xDA
PROGRESSIVE = (0xC2, 0xC6, 0xCA, 0xCE)  # frames whose coefficients are all held
# JFIF and Adobe say how colours are stored; the other application segments and comments do not.
LEFT_OUT = {*range(0xE1, 0xF0), 0xFE} - {0xEE}
XMP = b"http://ns.adobe.com/xap/1.0/\0"
MOST_SCANS = 100  # jpegtran's own script has 10
MOST_SEGMENTS = 10_000
MOST_CHUNKS, MOST_PICTURE_CHUNKS = 1000, 100_000  # of a PNG, beside those with pixels, and those
PICTURE_CHUNKS = (b"IDAT", b"fdAT", b"fcTL")
MOST_STEPS = 10_000  # blocks of a GIF before a picture
SHORT_BLOCK = 128  # bytes; encoders write blocks of 255
RLE_BYTES, RLE_PIXELS = 1 << 21, 1 << 22  # of a BMP that is packed by runs, read in Python


@dataclass(frozen=True)
class ImageFile:
    """`data` is what Pillow is to decode; `exif` and `xmp` were in the file of a JPEG, whose
    `scans` are counted. `is_progressive`: are all its coefficients held while it is decoded?"""

    data: bytes
    exif: bytes = b""
    xmp: bytes = b""
    scans: int = 0
    is_progressive: bool = False


def check_file(data: bytes, name: str, most_pixels: int) -> ImageFile:
    """What is to be decoded. Raises UserError for a file that would take too long or too much."""
    if data.startswith(b"\xff\xd8\xff"):
        return _check_jpeg(data, name)
    fault = None
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        fault = _png_fault(data)
    elif data.startswith((b"GIF87a", b"GIF89a")):
        fault = gif_fault(data)
    elif data.startswith(b"BM"):
        fault = _bmp_fault(data)
    elif data.startswith((b"II", b"MM")):
        fault = tiff_fault(data, most_pixels)
    if fault:
        raise UserError(f"{name} {fault}")
    return ImageFile(data)


def _check_jpeg(data: bytes, name: str) -> ImageFile:
    """Its segments up to the end of the picture; further pictures behind it are left out."""
    exif = xmp = b""
    parts, begin, at, scans, segments, is_progressive = [], 0, 2, 0, 0, False
    while marker := MARKER.search(data, at):
        code, start = marker[1][0], marker.start()
        at = marker.end()
        if code == END_OF_IMAGE:
            break
        if code == START_OF_IMAGE:
            continue
        at += max(2, int.from_bytes(data[at : at + 2], "big"))
        segments += 1
        scans += code == START_OF_SCAN
        is_progressive |= code in PROGRESSIVE
        for count, most, things in (
            (scans, MOST_SCANS, "scans"), (segments, MOST_SEGMENTS, "segments"),
        ):  # fmt: skip
            if count > most:
                raise UserError(f"{name} has more than {most} {things}")
        if code in LEFT_OUT and not scans:
            content = data[marker.end() + 2 : at]
            if content.startswith(b"Exif\0\0") and not exif:
                exif = content
            elif content.startswith(XMP) and not xmp:
                xmp = content
            parts.append(data[begin:start])
            begin = at
    parts.append(data[begin:])
    return ImageFile(b"".join(parts), exif, xmp, scans, is_progressive or scans > 1)


def _png_fault(data: bytes) -> str | None:
    at, chunks, pictures = 8, 0, 0
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">L4s", data, at)
        pictures += kind in PICTURE_CHUNKS
        chunks += kind not in PICTURE_CHUNKS
        if chunks > MOST_CHUNKS:
            return f"has more than {MOST_CHUNKS} chunks beside its pixels"
        if pictures > MOST_PICTURE_CHUNKS:
            return f"has more than {MOST_PICTURE_CHUNKS} chunks of pixels"
        at += 12 + length
    return None


def gif_fault(data: bytes, *, is_animated: bool = False) -> str | None:
    """What is wrong with a GIF, if anything: counts what is read one by one before its first
    picture, or of an animation before each."""
    if not data.startswith((b"GIF87a", b"GIF89a")):
        return None
    at, steps = 13 + _palette_bytes(data, 10), 0
    while at < len(data) and data[at : at + 1] != b";":
        if data[at : at + 1] == b",":
            if not is_animated:
                return None
            begin = at + 11 + _palette_bytes(data, at + 9)
            (at, blocks), steps = _behind_blocks(data, begin), 0
            if blocks > MOST_STEPS + (at - begin) // SHORT_BLOCK:
                return f"has a picture in {blocks} blocks, shorter than encoders write them"
            continue
        if data[at : at + 1] == b"!":
            at += 2
            while at < len(data) and data[at] and steps <= MOST_STEPS:
                at, steps = at + 1 + data[at], steps + 1
        at, steps = at + 1, steps + 1
        if steps > MOST_STEPS:
            return f"has more than {MOST_STEPS} blocks before a picture"
    return None


def _palette_bytes(data: bytes, at: int) -> int:
    """Of the colours that follow where this byte of flags says so."""
    return 3 << ((data[at] & 7) + 1) if len(data) > at and data[at] & 0x80 else 0


def _behind_blocks(data: bytes, at: int) -> tuple[int, int]:
    """The place behind a picture's blocks, the last of which is empty, and their number."""
    blocks = 0
    while at < len(data) and data[at]:
        at, blocks = at + 1 + data[at], blocks + 1
    return at + 1, blocks


def _bmp_fault(data: bytes) -> str | None:
    if len(data) < 34:
        return None
    length, width, height = struct.unpack_from("<L2l", data, 14)
    (packing,) = struct.unpack_from("<L", data, 30)
    if length < 40 or packing not in (1, 2):
        return None
    if len(data) > RLE_BYTES or max(width, 256) * max(abs(height), 256) > RLE_PIXELS:
        return "is a BMP packed by runs (RLE), and a large one; save it as PNG"
    return None
