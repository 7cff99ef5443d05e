"""The user's cache folder, and the key of a model in it: its content, never its path.

The folder is $MLX_VLM_PRUNE_CACHE, else mlx_vlm_prune in $XDG_CACHE_HOME, else in ~/.cache.
"""

import hashlib
import os
from pathlib import Path

from ..checkpoints.config import CONFIG
from ..checkpoints.errors import UserError
from ..checkpoints.reading.files import write_atomically
from ..checkpoints.reading.paths import LARGEST_JSON, check_regular, expand_home, find_files

HEADER = 64 * 1024  # bytes read at a weights file's beginning
WEIGHTS = ("*.safetensors", "*.bin", "*.pth")  # learned pruners beside a model count too
SAMPLES, SAMPLE = 64, 4096  # and spread over all of it: a header can be as long, and alike


def cache_folder() -> Path:
    """The user's folder for what can be made again; it need not exist."""
    if folder := os.environ.get("MLX_VLM_PRUNE_CACHE"):
        return expand_home(folder)
    parent = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return expand_home(parent) / "mlx_vlm_prune"


def model_key(folder: str | Path) -> str:
    """A model's fingerprint, 16 hexadecimal digits: equal for a copy elsewhere.

    Made of config.json, and of each weights file's name, size, first 64 kB and samples of the
    rest, so that it takes no time. Raises UserError where they cannot be read.
    """
    folder = Path(folder)
    files = find_files(folder, *WEIGHTS)
    if not files:
        raise UserError(f"{folder} holds no weights")
    digest = hashlib.sha256()
    for file in files:
        check_regular(file)
    try:
        if (folder / CONFIG).exists():
            check_regular(folder / CONFIG, LARGEST_JSON)
            digest.update((folder / CONFIG).read_bytes())
        for file in files:
            digest.update(f"\n{file.name} {file.stat().st_size}\n".encode())
            digest.update(_read_samples(file))
    except OSError as e:
        raise UserError(f"cannot read {e.filename or folder}: {e.strerror or e}") from None
    return digest.hexdigest()[:16]


def _read_samples(file: Path) -> bytes:
    size = file.stat().st_size
    with file.open("rb") as stream:
        parts = [stream.read(HEADER)]
        for n in range(1, SAMPLES + 1):
            stream.seek(max(0, size * n // SAMPLES - SAMPLE))
            parts.append(stream.read(SAMPLE))
    return b"".join(parts)


def write_cached(path: Path, text: str) -> None:
    """Write a file below the cache folder; UserError where that cannot be done."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"cannot write into {path.parent}: {e.strerror or e}") from None
    write_atomically(path, text)
