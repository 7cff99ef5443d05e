"""Plain data from a stranger's pickle: no name in it is looked up, so nothing in it can run.

Before anything is built the whole stream is looked through. Allowed are numbers, texts,
lists, tuples, dicts and references to what came before; whatever names, calls or makes an
object is refused, and so is a reference further ahead than the stream is long, which would
only cost memory.
"""

import io
import pickle
import pickletools
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from ...checkpoints.errors import UserError

LARGEST = 1 << 29  # bytes
PLAIN = frozenset(
    """PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 FLOAT
    BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE LIST EMPTY_LIST
    APPEND APPENDS TUPLE EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 DICT EMPTY_DICT SETITEM SETITEMS GET
    BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE""".split()
)
CODES = {code.code: code for code in pickletools.opcodes}


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def plain_data(path: Path) -> Any:
    """What a pickle of plain data holds. Raises UserError for any other."""
    try:
        if path.stat().st_size > LARGEST:
            raise UserError(f"{path} is larger than {LARGEST >> 20} MB")
        data = path.read_bytes()
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    _look_through(data, path)
    try:
        # Python 2 wrote the published files; its texts are bytes, of which a few are not ASCII.
        return _Plain(io.BytesIO(data), encoding="utf-8", errors="replace").load()
    except Exception as e:  # an unpickler that is fed garbage may raise anything
        raise UserError(f"{path} is not a readable pickle ({e})") from None


def _look_through(data: bytes, path: Path) -> None:
    stream = io.BytesIO(data)
    with tqdm(total=len(data), desc=path.name, unit="B", unit_scale=True, delay=2) as bar:
        try:
            name = ""
            while name != "STOP":
                name = _next(stream, len(data))
                bar.update(stream.tell() - bar.n)
        except pickle.UnpicklingError as e:
            raise UserError(f"{path} holds more than plain data ({e}); it is not read") from None
        except Exception as e:
            raise UserError(f"{path} is not a readable pickle ({e})") from None


def _next(stream: io.BytesIO, longest: int) -> str:
    """The name of the next code, having read past what belongs to it."""
    byte = stream.read(1).decode("latin-1")
    if byte not in CODES:
        raise ValueError("it ends early" if not byte else f"{byte!r} is no code of a pickle")
    code = CODES[byte]
    if code.name not in PLAIN:
        raise pickle.UnpicklingError(code.name)
    if code.name == "STRING":  # Python's own reader takes ASCII only
        stream.readline()
        return code.name
    told = code.arg.reader(stream) if code.arg else 0
    if "PUT" in code.name and int(told) > longest:
        raise ValueError("a reference is out of bounds")
    return code.name
