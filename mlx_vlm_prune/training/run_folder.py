"""The folder of a run: whose it is, and that one process at a time writes to it."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from ..checkpoints.errors import UserError
from ..checkpoints.reading.files import atomic_path, write_json
from ..checkpoints.reading.locks import locked
from .config import TrainConfig
from .metrics import FILE as METRICS
from .run_state import FOLDER, checkpoint_folders

RUN, LOCK = "run.json", "run.lock"


@contextmanager
def claimed(config: TrainConfig) -> Iterator[Path]:
    """The folder, made if need be, for this process alone.

    Raises UserError where another process writes to it, where it holds a run and `resume` is not
    set, or other files. A killed process leaves nothing in force: its lock ends with it.
    """
    folder = config.folder
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"cannot make the folder {folder}: {e.strerror or e}") from None
    try:
        with locked(folder / LOCK, f"another process is training in {folder}; wait for it"):
            _check(folder, config)
            if not checkpoint_folders(folder):  # a run that kept nothing leaves nothing behind
                (folder / METRICS).unlink(missing_ok=True)
                with atomic_path(folder / RUN, replace=True) as path:
                    write_json(path, asdict(config))
            _sweep(folder / FOLDER)
            yield folder
    finally:
        if is_new:
            with suppress(OSError):  # it is not empty, or somebody else's by now
                folder.rmdir()


def _check(folder: Path, config: TrainConfig) -> None:
    """Raise UserError where the folder is not this run's."""
    begun = f".{RUN}.part-"  # which a killed process left
    names = {path.name for path in folder.iterdir() if not path.name.startswith(begun)} - {LOCK}
    if names and RUN not in names:
        raise UserError(f"{folder} holds files of something else; give another place")
    if checkpoint_folders(folder) and not config.resume:
        raise UserError(f"{folder} holds another run; resume it, or give another place")


def _sweep(folder: Path) -> None:
    """Remove halves of checkpoints that a killed process left; no other one writes here."""
    for stray in folder.glob(".*.part-*"):
        shutil.rmtree(stray, ignore_errors=True)
