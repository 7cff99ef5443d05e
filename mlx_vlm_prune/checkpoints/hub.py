"""A path, or a name on the Hugging Face hub, to a path on this disk.

What comes from the hub is read with the same distrust as any file. `HF_HUB_OFFLINE=1` uses
what is in the cache, `HF_HOME` says where that is.
"""

from contextlib import suppress
from pathlib import Path

from .errors import UserError, reason

WANTED = ["*.json", "*.jinja", "*.safetensors", "*.model", "*.tiktoken", "merges.txt", "vocab.txt"]


def found(path_or_name: str | Path, revision: str | None = None) -> Path:
    """The file or folder: one that exists, else `owner/name` or `owner/name/file` of the hub.

    Raises UserError where there is neither.
    """
    path = Path(path_or_name).expanduser()
    name = str(path_or_name)
    parts = name.split("/")
    is_file = path.suffix in (".pth", ".bin", ".safetensors")
    local = path.exists() or name.startswith((".", "/", "~")) or {"", ".."} & set(parts)
    if local or len(parts) < 2 or is_file != (len(parts) > 2):
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
        held: list[str] = []
        with suppress(OfflineModeIsEnabled, HfHubHTTPError, OSError):
            held = list_repo_files(name, revision=revision)
        patterns = WANTED + _pickles(name, held)
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except problems as e:
        raise UserError(
            f"there is no {name} here, and the hub did not give it: {reason(e)}"
        ) from None


def _pickles(name: str, held: list[str]) -> list[str]:
    """Patterns of pickled weights, wanted where a repository has no others; one .pth only."""
    if any(file.endswith(".safetensors") for file in held):
        return []
    several = [file for file in held if file.endswith(".pth")]
    if len(several) > 1:
        raise UserError(f"{name} holds {', '.join(several)}: name one, as {name}/{several[0]}")
    return ["*.bin", "*.pth"]
