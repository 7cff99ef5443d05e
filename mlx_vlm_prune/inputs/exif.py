"""The directory of an EXIF block or a TIFF file: which way up a picture is, and what it claims.

Pillow reads all that a directory points at, also what a thousand entries share; only the few
numbers that are needed are read here.
"""

import re
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

ORIENTATION, WIDTH, HEIGHT = 0x112, 256, 257
TILE_WIDTH, TILE_HEIGHT, STRIPS, TILES = 322, 323, 273, 324
SUBDIRECTORIES = (34665, 34853, 40965)  # EXIF, GPS, interoperability
SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
INTEGERS = {1: "B", 3: "H", 4: "L"}
BIG_TIFF = 43  # in place of 42
MOST_ENTRIES = 1000
MOST_PARTS = 100_000  # strips or tiles
XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')


class Entry(NamedTuple):
    """`value` is its first number where it lies in the entry itself, or else where they begin."""

    kind: int
    length: int
    value: int


def orientation(exif: bytes, xmp: bytes = b"") -> int:
    """From 1, upright, to 8, as EXIF counts them; 1 where nothing says so."""
    entry = directory(exif.removeprefix(b"Exif\0\0")).get(ORIENTATION)
    if entry and entry.length == 1 and entry.kind in INTEGERS:
        return entry.value if 1 <= entry.value <= 8 else 1
    stated = XMP_ORIENTATION.search(xmp)
    return int(stated[1]) if stated else 1


def orientation_of(info: Mapping[Any, Any]) -> int:
    """The same of what Pillow tells of a picture."""
    exif, xmp = info.get("exif"), info.get("XML:com.adobe.xmp") or info.get("xmp") or b""
    if exif is None and isinstance(raw := info.get("Raw profile type exif"), str):
        try:  # ImageMagick's, in hexadecimal
            exif = bytes.fromhex("".join(raw.split("\n")[3:]))
        except ValueError:
            exif = None
    xmp = xmp.encode(errors="replace") if isinstance(xmp, str) else xmp
    return orientation(exif or b"", xmp)


def directory(block: bytes, place: int | None = None) -> dict[int, Entry]:
    """The entries of a block's first directory, or of that at `place`, as far as they go."""
    order = {b"II": "<", b"MM": ">"}.get(block[:2])
    if order is None or len(block) < 10:
        return {}
    if place is None:
        (place,) = struct.unpack_from(f"{order}L", block, 4)
    if place + 2 > len(block):
        return {}
    (count,) = struct.unpack_from(f"{order}H", block, place)
    entries: dict[int, Entry] = {}
    for start in range(place + 2, min(place + 2 + 12 * count, len(block) - 11), 12):
        tag, kind, number = struct.unpack_from(f"{order}2HL", block, start)
        here = INTEGERS.get(kind, "L") if number == 1 else "L"
        (value,) = struct.unpack_from(f"{order}{here}", block, start + 8)
        entries.setdefault(tag, Entry(kind, number, value))
    return entries


def tiff_fault(data: bytes, most_pixels: int) -> str | None:
    """Why a TIFF is not to be decoded, the end of a sentence, or None."""
    if BIG_TIFF in data[2:4]:  # whose directories are laid out otherwise
        return "is a BigTIFF; save it as a TIFF or PNG"
    first = directory(data)
    directories = [first, *(directory(data, first[tag].value) for tag in SUBDIRECTORIES
                            if tag in first)]  # fmt: skip
    if any(len(entries) > MOST_ENTRIES for entries in directories):
        return f"has more than {MOST_ENTRIES} entries in a directory"
    claimed = sum(
        entry.length * SIZES.get(entry.kind, 1) for part in directories for entry in part.values()
    )
    if claimed > len(data):
        return "has entries that claim more bytes than there are"
    if any(first[tag].length > MOST_PARTS for tag in (STRIPS, TILES) if tag in first):
        return f"has more than {MOST_PARTS} strips or tiles"
    sides = [first[tag].value for tag in (TILE_WIDTH, TILE_HEIGHT) if tag in first]
    if len(sides) == 2 and sides[0] * sides[1] > most_pixels:
        return "has tiles larger than the picture may be"
    return None
