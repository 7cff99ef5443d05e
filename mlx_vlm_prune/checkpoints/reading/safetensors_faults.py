"""Why the safetensors library refuses a file, in a sentence.

The library decides (arithmetic in Rust, fuzzed); this only finds the words.
"""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..errors import quoted
from .paths import LARGEST_JSON

LONGEST_HEADER = LARGEST_JSON  # of 200,000 tensors; the format allows 100 MB
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "U16": 16, "I16": 16, "F16": 16,
    "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
}  # fmt: skip


def is_header_too_long(path: Path) -> bool:
    """Is the header one to hold in memory? The library would parse whatever length it claims."""
    with path.open("rb") as opened:
        return int.from_bytes(opened.read(8), "little") > LONGEST_HEADER


def first_fault(path: Path) -> str | None:
    """The end of a sentence about the first fault, or None."""
    size = path.stat().st_size
    with path.open("rb") as opened:
        begin = opened.read(8)
        if len(begin) < 8:
            return f"it has {size} bytes, and a header's length alone takes 8"
        length = int.from_bytes(begin, "little")
        if length > size - 8:
            return f"its header claims {length} bytes, and the file has {size}"
        if length > LONGEST_HEADER:
            return f"its header has {length} bytes; at most {LONGEST_HEADER} are read"
        text = opened.read(length)
    try:
        header = json.loads(text.decode("utf-8"))
    except UnicodeDecodeError:
        return "its header is not UTF-8"
    except (ValueError, RecursionError):
        return "its header is not JSON"
    if not isinstance(header, dict):
        return "its header is no JSON object"
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        return "its __metadata__ is no object of strings"
    for name, entry in header.items():
        if fault := _entry_fault(entry):
            return f"tensor {quoted(name)} {fault}"
    return _offsets_fault(header, size - 8 - length)


def _entry_fault(entry: Any) -> str | None:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return "lacks dtype, shape or data_offsets, or has more than these"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        return f"has a dtype that is not known: {str(dtype)[:20]!r}"
    if not isinstance(shape, list) or not all(type(n) is int for n in shape):
        return "has a shape that is no list of whole numbers"
    if any(n < 0 for n in shape):
        return f"has a negative size: {shape}"
    if not _are_offsets(offsets):
        return f"has data_offsets that are no [begin, end]: {str(offsets)[:40]}"
    bits = BITS[dtype]
    for n in shape:
        bits *= n
    if bits >= 1 << 63:
        return f"has a shape of more bytes than can be counted: {shape}"
    size = offsets[1] - offsets[0]
    if bits != 8 * size:
        return f"has {size} bytes, and its shape {shape} takes {bits // 8}"
    return None


def _are_offsets(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 2:
        return False
    return all(type(n) is int and n >= 0 for n in value) and value[0] <= value[1]


def _offsets_fault(header: dict[str, Any], body: int) -> str | None:
    """Tensors must follow one another without a gap; `body` is the number of bytes there are."""
    ordered = sorted(header, key=lambda name: header[name]["data_offsets"])
    ends = [("the header", [0, 0]), *((name, header[name]["data_offsets"]) for name in ordered)]
    for (before, (_, end)), (name, (begin, _)) in pairwise(ends):
        if begin < end:
            return f"tensors {quoted(before)} and {quoted(name)} overlap"
        if begin > end:
            return f"there are {begin - end} bytes of no tensor before tensor {quoted(name)}"
    end = ends[-1][1][1]
    if end > body:
        return f"it is cut off: {end - body} bytes are missing at its end"
    return f"there are {body - end} bytes of no tensor at its end" if end < body else None
