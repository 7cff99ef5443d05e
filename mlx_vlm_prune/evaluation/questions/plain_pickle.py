"""Plain data from an untrusted pickle: no name in it is imported, so no code in it can run.

The whole stream is checked before anything is built. Numbers, texts, lists, tuples, dicts and
references to earlier values are allowed. An opcode that imports, calls or creates an object is
refused, and so is a memo index larger than the stream, which would only use up memory.
"""

import io
import pickle
import pickletools
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from ...checkpoints.errors import UserError

LARGEST_FILE = 1 << 29  # bytes
PLAIN_OPCODES = frozenset(
    """PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 FLOAT
    BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE LIST EMPTY_LIST
    APPEND APPENDS TUPLE EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 DICT EMPTY_DICT SETITEM SETITEMS GET
    BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE""".split()
)
OPCODES = {code.code: code for code in pickletools.opcodes}


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def read_plain_pickle(path: Path) -> Any:
    """The content of a pickle of plain data. Raises UserError for any other file."""
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise UserError(f"{path} is larger than {LARGEST_FILE >> 20} MB")
        data = path.read_bytes()
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    _check_opcodes(data, path)
    try:
        # Python 2 wrote the published files; its texts are bytes, of which a few are not ASCII.
        return _PlainUnpickler(io.BytesIO(data), encoding="utf-8", errors="replace").load()
    except Exception as e:  # an unpickler that is fed garbage may raise anything
        raise UserError(f"{path} is not a readable pickle ({e})") from None


def _check_opcodes(data: bytes, path: Path) -> None:
    stream = io.BytesIO(data)
    with tqdm(total=len(data), desc=path.name, unit="B", unit_scale=True, delay=2) as bar:
        try:
            name = ""
            while name != "STOP":
                name = _next_opcode(stream, len(data))
                bar.update(stream.tell() - bar.n)
        except pickle.UnpicklingError as e:
            raise UserError(f"{path} holds more than plain data ({e}); it is not read") from None
        except Exception as e:
            raise UserError(f"{path} is not a readable pickle ({e})") from None


def _next_opcode(stream: io.BytesIO, most_memo: int) -> str:
    """Read the next opcode with its argument; its name."""
    byte = stream.read(1).decode("latin-1")
    if byte not in OPCODES:
        raise ValueError("it ends early" if not byte else f"{byte!r} is no code of a pickle")
    code = OPCODES[byte]
    if code.name not in PLAIN_OPCODES:
        raise pickle.UnpicklingError(code.name)
    if code.name == "STRING":  # Python's own reader takes ASCII only
        stream.readline()
        return code.name
    argument = code.arg.reader(stream) if code.arg else 0
    if "PUT" in code.name and int(argument) > most_memo:
        raise ValueError("a reference is out of bounds")
    return code.name
