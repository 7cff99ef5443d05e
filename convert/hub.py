"""A path, or a name on the Hugging Face hub, to a path on this disk.

What comes from the hub is read with the same distrust as any file. `HF_HUB_OFFLINE=1` uses
what is in the cache, `HF_HOME` says where that is.
"""

from pathlib import Path

from .errors import UserError

WANTED = ["*.json", "*.jinja", "*.safetensors"]
PICKLES = ["*.bin", "*.pth"]  # only where there is no safetensors


def found(path_or_name: str | Path, revision: str | None = None) -> Path:
    """The file or folder: one that exists, else `owner/name` or `owner/name/file` of the hub.

    Raises UserError where there is neither.
    """
    path = Path(path_or_name).expanduser()
    name = str(path_or_name)
    parts = name.split("/")
    local = path.exists() or len(parts) < 2 or name.startswith((".", "/", "~"))
    local |= len(parts) == 2 and path.suffix in (".pth", ".pt", ".bin", ".safetensors")
    if local or "" in parts or ".." in parts or len(parts) > 4:
        if not path.exists():
            raise UserError(f"there is no {path}, and {name!r} is no hub name (owner/name) either")
        return path
    return _fetched("/".join(parts[:2]), "/".join(parts[2:]), revision)


def _fetched(name: str, file: str, revision: str | None) -> Path:
    """A snapshot of a repository, or one file of it."""
    from huggingface_hub import hf_hub_download, list_repo_files, snapshot_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    problems = (
        HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, EntryNotFoundError, OSError,
    )  # fmt: skip
    try:
        if file:
            return Path(hf_hub_download(name, file, revision=revision))
        try:
            held = list_repo_files(name, revision=revision)
            safe = any(one.endswith(".safetensors") for one in held)
        except (OfflineModeIsEnabled, HfHubHTTPError, OSError):
            safe = False  # the cache has what it has
        patterns = WANTED if safe else WANTED + PICKLES
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except problems as e:
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise UserError(f"there is no {name} here, and the hub did not give it: {reason}") from None
