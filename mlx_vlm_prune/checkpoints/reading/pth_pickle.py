"""The pickle of a .pth, gone through before torch loads it; nothing that it names is called here.

torch's `weights_only` executes nothing, but it makes whatever a pickle orders: `bytearray(10**10)`,
or one long list copied a thousand times. Here each name stands for an empty mapping, and only what
describes tensors is allowed.
"""

import io
import pickle
import re
from typing import Any, ClassVar

# Those that torch.save writes for names with tensors, numbers and texts.
OPCODES = b"\x80cRb(at\x85\x86\x87)]}esuNJKMGXUQ\x88\x89\x8ahjqr."
NAMES = re.compile(
    r"collections\.OrderedDict|torch\._utils\._rebuild_(tensor(_v[23])?|parameter(_with_state)?)"
    r"|torch(\.\w+)?\.\w*Storage|torch\.(Size|device|bool|b?float\d+|float8_\w+|u?int\d+)"
)
LONGEST_ARGUMENT = 64  # of a call: a tensor's sizes, or the attributes of a state dict
PythonUnpickler: Any = pickle._Unpickler  # whose opcodes can be chosen, unlike those of the C one


def check_pickle(data: bytes) -> None:
    """Raises an exception, whose text says why, for a pickle that torch is not to load."""
    _Rehearsal(io.BytesIO(data)).load()


def _check_argument(value: Any) -> None:
    if isinstance(value, list | tuple | dict) and len(value) > LONGEST_ARGUMENT:
        raise pickle.UnpicklingError(f"it copies a {type(value).__name__} of {len(value)} values")


class _Named(dict):
    """A mapping, or what stands for anything that a pickle names."""

    def __init__(self, *arguments: Any):
        super().__init__()
        for value in arguments:
            _check_argument(value)

    def __setitem__(self, key: Any, value: Any) -> None:
        if not isinstance(key, str | int):  # hashing tuples of tuples may never end
            raise pickle.UnpicklingError(f"a key of it is a {type(key).__name__}")
        super().__setitem__(key, value)

    def __setstate__(self, state: Any) -> None:
        _check_argument(state)


class _Rehearsal(PythonUnpickler):
    """Loads a pickle without what it names."""

    dispatch: ClassVar[dict[int, Any]] = {
        **{code: PythonUnpickler.dispatch[code] for code in OPCODES},
        ord("}"): lambda self: self.append(_Named()),
    }

    def find_class(self, module: str, name: str) -> type[_Named]:
        if not NAMES.fullmatch(f"{module}.{name}"):
            raise pickle.UnpicklingError(f"it names {module}.{name}"[:100])
        return _Named

    def persistent_load(self, pid: Any) -> None:
        """A storage, whose bytes are another part of the file."""
