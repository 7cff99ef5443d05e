"""One process at a time for a file or folder: a lock that ends with its process."""

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError

logger = logging.getLogger("mlx_vlm_prune")


@contextmanager
def locked(path: Path, refusal: str) -> Iterator[None]:
    """Hold a lock on the file `path`, which is made if need be and removed at the end.

    A killed process leaves the file, but no lock. Where the file system knows no locks, a warning
    says so. Raises UserError: with the sentence `refusal` where another process holds the lock.
    """
    descriptor = _opened(path)
    while not _lock(descriptor, path, refusal):  # its holder has just removed the file
        descriptor = _opened(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


@contextmanager
def writing_alone(target: Path, work: str, option: str) -> Iterator[None]:
    """Refuse another process that would write its result to `target` meanwhile.

    `work` is what it does there, `option` the flag that names another place. Raises UserError.
    """
    refusal = (
        f"another process is {work} into {target}; wait for it, or name another file with {option}"
    )
    with locked(target.with_name(f".{target.name}.lock"), refusal):
        yield


def _opened(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as e:
        raise UserError(f"cannot write to {path.parent}: {e.strerror or e}") from None


def _lock(descriptor: int, path: Path, refusal: str) -> bool:
    """Whether the lock is held now, and on the file that `path` names."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(refusal) from None
    except OSError as e:
        logger.warning(f"{path} cannot be locked ({e.strerror or e}): start one run at a time")
        return True
    try:
        if os.fstat(descriptor).st_ino == path.stat().st_ino:
            return True
    except FileNotFoundError:
        pass
    os.close(descriptor)
    return False
