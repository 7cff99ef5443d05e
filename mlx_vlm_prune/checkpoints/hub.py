"""A path, or a name on the Hugging Face hub, to a path on this disk.

What comes from the hub is read with the same distrust as any file. `HF_HOME` says where the cache
is; it answers where the hub cannot, and with `HF_HUB_OFFLINE=1` alone.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any

from .errors import UserError, reason
from .reading.files import read_json

WANTED = ["*.json", "*.jinja", "*.safetensors", "*.model", "*.tiktoken", "merges.txt", "vocab.txt"]
WEIGHTS = (".pth", ".bin", ".safetensors")


def found(path_or_name: str | Path, revision: str | None = None) -> Path:
    """The file or folder: one that exists, else `owner/name` or `owner/name/file` of the hub.

    Raises UserError where there is neither.
    """
    path = Path(path_or_name).expanduser()
    name = str(path_or_name)
    parts = name.split("/")
    is_file = path.suffix in WEIGHTS
    local = path.exists() or name.startswith((".", "/", "~")) or {"", ".."} & set(parts)
    if local or len(parts) < 2 or is_file != (len(parts) > 2):
        if not path.exists():
            raise UserError(f"there is no {path}, and {name!r} is no hub name (owner/name) either")
        return path
    return _fetched("/".join(parts[:2]), "/".join(parts[2:]), revision)


def _fetched(name: str, file: str, revision: str | None) -> Path:
    """A snapshot of a repository, or one file of it: from the hub, else from the cache.

    Raises UserError where neither has all of it.
    """
    try:
        return _downloaded(name, file, revision)
    except UserError:
        raise
    except Exception as e:  # of an HTTP library, and another one in each version of the hub's
        why = reason(e)
    if path := _cached(name, file, revision):
        return path
    raise UserError(
        f"{'/'.join(filter(None, (name, file)))} is not in the cache, or not all of it, and the hub"
        f" did not give it: {why}"
    )


def _downloaded(name: str, file: str, revision: str | None) -> Path:
    """As the hub has it now; what is in the cache already is not downloaded again."""
    from huggingface_hub import hf_hub_download, model_info, snapshot_download

    # Asked first: without a network it fails at once, where the others try for half a minute.
    held = [one.rfilename for one in model_info(name, revision=revision).siblings or ()]
    if file:
        return Path(hf_hub_download(name, file, revision=revision))
    patterns = WANTED + _pickles(name, held)
    return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))


def _cached(name: str, file: str, revision: str | None) -> Path | None:
    """What an earlier download left; None where that is nothing, or a part."""
    from huggingface_hub import hf_hub_download, snapshot_download

    here: dict[str, Any] = {"revision": revision, "local_files_only": True}
    with suppress(Exception):  # whatever the hub's library says of a cache that lacks something
        if file:
            return Path(hf_hub_download(name, file, **here))
        folder = Path(snapshot_download(name, allow_patterns=WANTED, **here))
        return folder if _is_whole(folder) else None
    return None


def _is_whole(snapshot: Path) -> bool:
    """Was its download not cut off? Most versions of the hub's library cannot tell.

    A shard is missing, or there are no weights and something lies half-downloaded. An index none
    of whose shards is there is an old one, beside weights in one file.
    """
    weights = {f.name for f in snapshot.iterdir() if f.suffix in WEIGHTS and f.is_file()}
    index = snapshot / "model.safetensors.index.json"
    parts = read_json(index).get("weight_map") if index.is_file() else None
    shards = set(parts.values()) if isinstance(parts, dict) else set()
    if weights:
        return not weights & shards or shards <= weights
    return not any((snapshot.parents[1] / "blobs").glob("*.incomplete"))


def _pickles(name: str, held: list[str]) -> list[str]:
    """Patterns of pickled weights, wanted where a repository has no others; one .pth only."""
    if any(file.endswith(".safetensors") for file in held):
        return []
    several = [file for file in held if file.endswith(".pth")]
    if len(several) > 1:
        raise UserError(f"{name} holds {', '.join(several)}: name one, as {name}/{several[0]}")
    return ["*.bin", "*.pth"]
