"""The zip archive of a .pth, taken only where every reader finds the same parts in it.

Python takes the zip64 record that lies before its locator, torch the one that the locator points
at; torch compares names without their case, and both hold a header beside the directory's entry.
What could be read in two ways is refused, since only one of them would be checked.
"""

import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from ..errors import UserError
from .paths import check_regular

END, LOCATOR = struct.Struct("<4s4H2LH"), struct.Struct("<4sLQL")
END64, HEADER = struct.Struct("<4sQ2H2L4Q"), struct.Struct("<4s5H3L2H")
LARGEST_PICKLE = 1 << 22  # bytes: the names and shapes of some 20,000 tensors
ZIP64, UNICODE_NAME = 1, 0x7075  # fields that an entry may have more of
ENCRYPTED, UTF_8 = 1, 0x800  # flags of an entry


def read_pickle(path: Path) -> bytes:
    """The pickle in a .pth, which names the tensors.

    Raises UserError where it is no zip archive of torch.save, or one that has two readings, or
    that is compressed, or claims more bytes than it has.
    """
    check_regular(path)
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            _check_sizes(path, entries, path.stat().st_size)
            return _pickle_of(file, entries, path.stat().st_size)
    except UserError:
        raise
    except _TwoReadings as e:
        raise UserError(f"{path} is refused: {e}") from None
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error):
        raise UserError(
            f"{path} is no checkpoint of torch.save (a zip archive, since torch 1.6), or is damaged"
        ) from None


class _TwoReadings(Exception):
    """The end of a sentence: why two readers may find different parts."""


def _check_sizes(path: Path, entries: Sequence[zipfile.ZipInfo], size: int) -> None:
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise UserError(f"{path} is refused: torch.save does not compress, and this is compressed")
    if sum(entry.file_size for entry in entries) > size:
        raise UserError(f"{path} is refused: its parts claim more bytes than the file has")


def _pickle_of(file: BinaryIO, entries: Sequence[zipfile.ZipInfo], size: int) -> bytes:
    """The part data.pkl of the one folder that the archive holds."""
    begin, count = _directory(file, size)
    if count != len(entries):
        raise _TwoReadings(f"its end counts {count} parts, and its directory has {len(entries)}")
    _check_names(entries)
    places: dict[str, tuple[int, int]] = {}
    end = 0
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        if entry.header_offset < end or (not places and entry.header_offset):
            raise _TwoReadings(f"its part {entry.filename[:80]!r} does not begin behind another")
        start = _data_start(file, entry)
        places[entry.filename], end = (start, entry.file_size), start + entry.file_size
    if end > begin:
        raise _TwoReadings("its parts reach into its directory")
    name = entries[0].filename.partition("/")[0] + "/data.pkl" if entries else ""
    start, length = places.get(name, (0, 0))
    if not length:
        raise UserError(f"{file.name} is no checkpoint of torch.save: it holds no data.pkl")
    if length > LARGEST_PICKLE:
        raise UserError(
            f"{file.name}: its data.pkl has {length} bytes; at most {LARGEST_PICKLE} are read"
        )
    file.seek(start)
    return file.read(length)


def _directory(file: BinaryIO, size: int) -> tuple[int, int]:
    """Where the archive's directory begins, and how many entries it has.

    The record at the file's end says so, and where there is one the zip64 record too. Raises
    _TwoReadings where they differ, or the directory does not lie before them.
    """
    stop = size - END.size
    signature, *narrow, comment = END.unpack(_read(file, stop, END.size))
    if signature != b"PK\5\6" or comment:
        raise _TwoReadings("its zip archive does not end with the file")
    wide = tuple(narrow)
    locator = _read(file, max(0, stop - LOCATOR.size), LOCATOR.size)
    if locator.startswith(b"PK\6\7"):
        _, disk, place, disks = LOCATOR.unpack(locator)
        stop -= LOCATOR.size + END64.size
        record = END64.unpack(_read(file, max(0, stop), END64.size))
        signature, length, *_ = record
        is_sound = (signature, length, disk, disks) == (b"PK\6\6", END64.size - 12, 0, 1)
        if not is_sound or place != stop:
            raise _TwoReadings("its zip64 locator does not point at the record before it")
        wide = record[4:]
        unknown = (0xFFFF,) * 4 + (0xFFFFFFFF,) * 2
        if any(n not in (w, u) for n, w, u in zip(narrow, wide, unknown, strict=True)):
            raise _TwoReadings("its zip64 record and its end differ")
    disk, first_disk, here, count, length, begin = wide
    if disk or first_disk or here != count or begin + length != stop:
        raise _TwoReadings("its directory does not lie before its end")
    return begin, count


def _check_names(entries: Sequence[zipfile.ZipInfo]) -> None:
    names = [entry.filename for entry in entries]
    if len({name.lower() for name in names}) < len(names):  # torch does not mind the case
        raise _TwoReadings("two of its parts have one name")
    if len({name.partition("/")[0] for name in names}) > 1:
        raise _TwoReadings("its parts lie in more than one folder")
    for entry in entries:
        kinds = _extra_kinds(entry.extra)
        is_plain = entry.filename == entry.orig_filename and not entry.flag_bits & ENCRYPTED
        if not is_plain or kinds.count(ZIP64) > 1 or UNICODE_NAME in kinds:
            raise _TwoReadings(f"its part {entry.filename[:80]!r} has more than one name or size")


def _extra_kinds(extra: bytes) -> list[int]:
    """The kinds of an entry's further fields."""
    kinds = []
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<2H", extra)
        kinds.append(kind)
        extra = extra[4 + length :]
    return kinds


def _data_start(file: BinaryIO, entry: zipfile.ZipInfo) -> int:
    """Where a part's bytes begin; its own header must say what the directory says."""
    header = HEADER.unpack(_read(file, entry.header_offset, HEADER.size))
    signature, _, flags, method = header[:4]
    name_length, extra_length = header[-2:]
    name = entry.orig_filename.encode("utf-8" if entry.flag_bits & UTF_8 else "cp437")
    is_same = file.read(name_length) == name and entry.compress_size == entry.file_size
    if signature != b"PK\3\4" or method or flags & ENCRYPTED or not is_same:
        raise _TwoReadings(
            f"the header of its part {entry.filename[:80]!r} is not that of its directory"
        )
    return entry.header_offset + HEADER.size + name_length + extra_length


def _read(file: BinaryIO, place: int, count: int) -> bytes:
    file.seek(place)
    return file.read(count)
