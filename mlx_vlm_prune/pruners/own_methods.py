"""Methods of the user's own, from files on the command line.

`--pruner ./my_method.py:step=2` is the method of that file, which gets the file's name. A file is
run only where a user types it: neither a checkpoint nor a request to a server can name one.
"""

import argparse
from hashlib import sha256
from pathlib import Path

from ..checkpoints.errors import UserError
from ..checkpoints.user_module import load_user_module, name_files
from . import METHODS, register_pruner

SIGNS = "+:"  # of chains and options
_files: dict[str, tuple[Path, str]] = {}  # by method: its file, and the SHA-256 of what was run


def method_spec(text: str) -> str:
    """The type of the option --pruner: a specification, with names in place of files."""
    try:
        return register_files(text)
    except UserError as problem:
        raise argparse.ArgumentTypeError(str(problem)) from None


def register_files(spec: str) -> str:
    """A specification with names in place of files, whose methods are in the table then.

    Raises UserError for a file that is no method.
    """
    if Path(spec).is_file() and set(spec) & set(SIGNS):
        raise UserError(
            f"{spec}: a place with {' or '.join(SIGNS)} in it reads as a chain; move it"
        )
    return name_files(spec, _registered)


def _registered(path: Path) -> str:
    content = path.read_bytes() if path.is_file() else b""
    file = (path, sha256(content).hexdigest())
    if _files.get(path.stem) != file:
        method = load_user_module(path)
        if path.stem in _files:
            METHODS.pop(path.stem, None)  # an earlier version, or another file of this name
        register_pruner(method)
        _files[path.stem] = file
    return path.stem


def with_files(spec: str) -> str:
    """The specification again as it can be typed: with files in place of their methods' names."""
    parts = (part.partition(":") for part in spec.split("+"))
    names = ((str(_files[name][0]) if name in _files else name, *rest) for name, *rest in parts)
    return "+".join("".join(name) for name in names)


def file_digests(spec: str = "") -> dict[str, str]:
    """Of each method that came from a file, by name, the SHA-256 of what was run; of those in a
    specification, if there is one."""
    names = {part.partition(":")[0] for part in spec.split("+")} if spec else _files.keys()
    return {name: digest for name, (_, digest) in _files.items() if name in names}
