"""A path, or a name on the Hugging Face hub, to a path on this disk.

What comes from the hub is read with the same distrust as any file. `HF_HOME` says where the cache
is; it answers where the hub cannot, and with `HF_HUB_OFFLINE=1` alone.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any

from .errors import UserError, reason
from .reading.files import read_json
from .reading.paths import expand_home

PATTERNS = [
    "*.json",
    "*.jinja",
    "*.safetensors",
    "*.model",
    "*.tiktoken",
    "merges.txt",
    "vocab.txt",
]
WEIGHTS = (".pth", ".bin", ".safetensors")
DRAWN_MODELS = ("scenes-deep", "scenes-large")  # of drawn pictures; too large for a wheel
CLONE = Path(__file__).parents[2]


def resolve_path(path_or_name: str | Path, revision: str | None = None) -> Path:
    """A file or folder that exists, or else a download of `owner/name` or `owner/name/file`.

    Raises UserError where there is neither.
    """
    name = str(path_or_name)
    if not name:
        raise UserError("the name of a model or file is empty; give a path, or a name on the hub")
    path = expand_home(name)
    if name in DRAWN_MODELS and not path.exists():
        return _find_in_clone(name)
    parts = name.split("/")
    is_file = path.suffix in WEIGHTS
    local = path.exists() or name.startswith((".", "/", "~")) or {"", ".."} & set(parts)
    if local or len(parts) < 2 or is_file != (len(parts) > 2):
        if not path.exists():
            no_name = "" if is_file else f", and {name!r} is no hub name (owner/name) either"
            raise UserError(f"there is no {path}{no_name}")
        return path
    return _fetch("/".join(parts[:2]), "/".join(parts[2:]), revision)


def _find_in_clone(name: str) -> Path:
    place = Path("benchmarks", "models", name)
    if not (CLONE / place).is_dir():
        raise UserError(
            f"{name} lies in a clone of the repository, at {place}; there is none at"
            f" {CLONE / place}"
        )
    return CLONE / place


def _fetch(name: str, file: str, revision: str | None) -> Path:
    """A snapshot of a repository, or one file of it: from the hub, else from the cache.

    Raises UserError where neither has all of it.
    """
    try:
        return _download(name, file, revision)
    except UserError:
        raise
    except Exception as e:  # of an HTTP library, and another one in each version of the hub's
        why = reason(e)
    if path := _find_in_cache(name, file, revision):
        return path
    raise UserError(
        f"{'/'.join(filter(None, (name, file)))} is no path here; it is not in the cache, or"
        f" not all of it, and the hub did not give it: {why}"
    )


def _download(name: str, file: str, revision: str | None) -> Path:
    """The hub's newest; what is in the cache already is not downloaded again."""
    from huggingface_hub import hf_hub_download, model_info, snapshot_download

    # Asked first: without a network it fails at once, where the others try for half a minute.
    files = [f.rfilename for f in model_info(name, revision=revision).siblings or ()]
    if file:
        return Path(hf_hub_download(name, file, revision=revision))
    patterns = PATTERNS + _pickle_patterns(name, files)
    return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))


def _find_in_cache(name: str, file: str, revision: str | None) -> Path | None:
    """What an earlier download left; None where that is nothing, or a part."""
    from huggingface_hub import hf_hub_download, snapshot_download

    options: dict[str, Any] = {"revision": revision, "local_files_only": True}
    with suppress(Exception):  # whatever the hub's library says of a cache that lacks something
        if file:
            return Path(hf_hub_download(name, file, **options))
        folder = Path(snapshot_download(name, allow_patterns=PATTERNS, **options))
        return folder if _is_complete(folder) else None
    return None


def _is_complete(snapshot: Path) -> bool:
    """Did its download end? Most versions of the hub's library cannot tell.

    It did not where a shard is missing, or where weights are missing and a file is half
    downloaded. An index without any of its shards is an old one, beside weights in one file.
    """
    weights = {f.name for f in snapshot.iterdir() if f.suffix in WEIGHTS and f.is_file()}
    index = snapshot / "model.safetensors.index.json"
    parts = read_json(index).get("weight_map") if index.is_file() else None
    shards = set(parts.values()) if isinstance(parts, dict) else set()
    if weights:
        return not weights & shards or shards <= weights
    return not any((snapshot.parents[1] / "blobs").glob("*.incomplete"))


def _pickle_patterns(name: str, files: list[str]) -> list[str]:
    """Patterns of pickled weights, wanted where a repository has no others; one .pth only."""
    if any(file.endswith(".safetensors") for file in files):
        return []
    pths = [file for file in files if file.endswith(".pth")]
    if len(pths) > 1:
        raise UserError(f"{name} holds {', '.join(pths)}: name one, as {name}/{pths[0]}")
    return ["*.bin", "*.pth"]
