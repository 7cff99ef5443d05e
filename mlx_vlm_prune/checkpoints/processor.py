"""The tokenizer's and the preprocessor's files, which lie beside the weights."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UserError, reason
from .reading.files import optional_json
from .reading.paths import LARGEST_JSON, LARGEST_TOKENIZER, check_regular, is_here

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
TEMPLATE, OLDER_TEMPLATE = "chat_template.jinja", "chat_template.json"
TOKENIZER_FILES = (
    TOKENIZER, TOKENIZER_CONFIG, TEMPLATE, OLDER_TEMPLATE, "special_tokens_map.json",
    "added_tokens.json", "tokenizer.model", "vocab.json", "merges.txt",
)  # fmt: skip
PREPROCESSOR_CONFIG = "preprocessor_config.json"
# Nothing here reads these; they are carried along, so that a LLaVA comes back as it was.
CARRIED_FILES = ("generation_config.json", "processor_config.json")

# The end of an error about a checkpoint as published.
TOKENIZER_ADVICE = "; give the folder of the tokenizer (tokenizer=FOLDER)"


def read_tokenizer(folder: Path, advice: str = "") -> "Tokenizer":
    """The tokenizer in a folder; where there is none, a UserError that ends in `advice`."""
    from tokenizers import Tokenizer

    file = folder / TOKENIZER
    if not is_here(file):
        raise UserError(f"there is no {file}{advice}")
    check_regular(file, LARGEST_TOKENIZER)
    try:
        return Tokenizer.from_file(str(file))
    except Exception as e:  # the library raises bare Exception
        raise UserError(f"{file} is not a tokenizer: {reason(e)}") from None


def special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """The fields `bos_token` and the like; a token is a string, or an object with its content."""
    tokens = {}
    for key, value in config.items():
        content = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(content, str):
            tokens[key] = content
    return tokens


def chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """The template in a file of its own, or else in tokenizer_config.json, as in transformers."""
    file = folder / TEMPLATE
    if is_here(file):
        check_regular(file, LARGEST_JSON)
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, ValueError) as e:
            raise UserError(f"cannot read {file}: {reason(e)}") from None
    older = optional_json(folder / OLDER_TEMPLATE)
    template = older.get("chat_template", config.get("chat_template"))
    if isinstance(template, list):  # the older form: several, each with a name
        entries = [entry for entry in template if isinstance(entry, dict)]
        templates = {entry.get("name"): entry.get("template") for entry in entries}
        template = templates.get("default")
    if template is not None and not isinstance(template, str):
        raise UserError(f"{folder / TOKENIZER_CONFIG}: chat_template must be a string")
    return template


def preprocessor_folder(*folders: Path | None) -> Path | None:
    """The first of the folders that holds a preprocessor_config.json."""
    return next(
        (folder for folder in folders if folder and is_here(folder / PREPROCESSOR_CONFIG)), None
    )
