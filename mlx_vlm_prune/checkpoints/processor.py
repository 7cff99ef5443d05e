"""The tokenizer's and the preprocessor's files, which lie beside the weights."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import CONFIG
from .errors import UserError, is_unicode, quoted, reason
from .reading.files import optional_json
from .reading.paths import LARGEST_JSON, LARGEST_TOKENIZER, check_regular, is_here
from .tokenizer_check import check_model, check_tokenizer
from .tokenizer_trial import SAMPLES, TokenizerTrial, library_errors, try_tokenizer

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
TEMPLATE, OLDER_TEMPLATE = "chat_template.jinja", "chat_template.json"
SPECIAL_TOKENS, ADDED_TOKENS = "special_tokens_map.json", "added_tokens.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_FILES = (
    TOKENIZER, TOKENIZER_CONFIG, TEMPLATE, OLDER_TEMPLATE, SPECIAL_TOKENS,
    ADDED_TOKENS, "tokenizer.model", "vocab.json", "merges.txt",
)  # fmt: skip
PREPROCESSOR_CONFIG = "preprocessor_config.json"
# Carried along, so that a LLaVA comes back as it was.
CARRIED_FILES = (GENERATION_CONFIG, "processor_config.json")

FLAGS = ("single_word", "lstrip", "rstrip", "normalized")  # of a token that is added

# The end of an error about a checkpoint as published.
TOKENIZER_ADVICE = "; give the folder of the tokenizer (tokenizer=FOLDER)"


def read_tokenizer(folder: Path, advice: str = "") -> "Tokenizer":
    """The tokenizer in a folder; where there is none, a UserError that ends in `advice`."""
    return read_checked_tokenizer(folder, advice)[0]


def read_checked_tokenizer(
    folder: Path, advice: str = ""
) -> "tuple[Tokenizer, TokenizerTrial | None]":
    """The same, and by what its texts must be tried first, where they must."""
    from tokenizers import Tokenizer

    file = folder / TOKENIZER
    if not is_here(file):
        raise UserError(f"there is no {file}{advice}")
    trial = check_tokenizer_file(folder)
    with library_errors(f"{file} is not a tokenizer"):
        tokenizer = Tokenizer.from_file(str(file))
    check_model(tokenizer.model, file)
    with library_errors(f"{file} takes no further tokens"):
        _add_tokens(tokenizer, folder)
    return tokenizer, trial


def check_tokenizer_file(folder: Path) -> TokenizerTrial | None:
    """Before any library reads tokenizer.json in a folder: see `check_tokenizer`. One that is not
    surely quick is tried on samples, and its further texts are to be tried too. Raises
    UserError."""
    file = folder / TOKENIZER
    check_regular(file, LARGEST_TOKENIZER)
    try:
        doubt = check_tokenizer(file.read_bytes(), file)
    except OSError as e:
        raise UserError(f"cannot read {file}: {e.strerror or e}") from None
    if doubt is None:
        return None
    added = (_listed_tokens(token_settings(folder)) or {}).values()
    try_tokenizer(file, doubt, [*SAMPLES, *(token.content for token in added)])
    return TokenizerTrial(file, doubt)


def _add_tokens(tokenizer: "Tokenizer", folder: Path) -> None:
    """Tokens that only the files beside tokenizer.json have, as transformers adds them.

    Raises UserError for one that would not get the id that tokenizer_config.json gives it.
    """
    settings = token_settings(folder)
    present = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    listed = _listed_tokens(settings)
    if listed is None:
        listed = _older_list(folder, tokenizer, settings)
    new = [(key, t) for key, t in listed.items() if repr(present.get(t.content)) != repr(t)]
    for key, token in sorted(new, key=lambda item: item[0]):
        tokenizer.add_tokens([token])
        if (number := tokenizer.token_to_id(token.content)) != key:
            raise UserError(
                f"{folder / TOKENIZER_CONFIG} gives {quoted(token.content)} the id {key}, and"
                f" {TOKENIZER} leaves it {number}"
            )
    present |= {token.content: token for _, token in new}
    for token in filter(None, map(_special_token, _named_tokens(settings))):
        content = token.content
        if content not in present and tokenizer.token_to_id(content) is not None:
            tokenizer.add_tokens([token])


def _listed_tokens(settings: Mapping[str, Any]) -> "dict[int, AddedToken] | None":
    """What `added_tokens_decoder` has, by id; None where there is none."""
    entries = settings.get("added_tokens_decoder")
    if not isinstance(entries, dict):
        return None
    numbers = {int(key): value for key, value in entries.items() if re.fullmatch("[0-9]{1,9}", key)}
    tokens = {key: _added_token(value) for key, value in numbers.items()}
    return {key: token for key, token in tokens.items() if token}


def _older_list(
    folder: Path, tokenizer: "Tokenizer", settings: Mapping[str, Any]
) -> "dict[int, AddedToken]":
    """What added_tokens.json has, by id, as far as it goes on where the vocabulary ends."""
    special = {_content(value) for value in _named_tokens(settings)}
    entries = optional_json(folder / ADDED_TOKENS)
    new = {name for name in entries if _content(name) and tokenizer.token_to_id(name) is None}
    tokens: dict[int, AddedToken] = {}
    size = 1 + max(tokenizer.get_vocab().values(), default=-1) if new else 0
    for name in sorted(new, key=lambda name: entries[name] if type(entries[name]) is int else -1):
        if entries[name] == size:
            token = _added_token({"content": name, "special": name in special})
            tokens |= {size: token} if token else {}
            size += 1
    return tokens


def _named_tokens(settings: Mapping[str, Any]) -> Iterable[Any]:
    """The tokens that a field names: each is special."""
    for key, value in settings.items():
        if key.endswith("_token"):
            yield value
        elif key in ("additional_special_tokens", "extra_special_tokens"):
            listed = value.values() if isinstance(value, dict) else value
            yield from listed if isinstance(value, dict | list) else ()


def _special_token(value: Any) -> "AddedToken | None":
    fields = value if isinstance(value, dict) else {"content": value}
    return _added_token({**fields, "special": True})


def _added_token(value: Any) -> "AddedToken | None":
    """A token as a file has it: its text and flags."""
    from tokenizers import AddedToken

    content = _content(value)
    if not content:
        return None
    fields = value if isinstance(value, dict) else {}
    flags = {flag: fields[flag] for flag in FLAGS if isinstance(fields.get(flag), bool)}
    return AddedToken(content, special=fields.get("special") is True, **flags)


def _content(value: Any) -> str | None:
    """A token is a string, or an object with its content."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) and is_unicode(content) else None


def token_settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json with, as in transformers, what special_tokens_map.json has in place of
    its fields, unless it lists the added tokens itself."""
    config = optional_json(folder / TOKENIZER_CONFIG)
    return config if "added_tokens_decoder" in config else config | _token_map(folder)


def _token_map(folder: Path) -> dict[str, Any]:
    """The fields of special_tokens_map.json that hold tokens."""
    fields = optional_json(folder / SPECIAL_TOKENS).items()
    return {key: value for key, value in fields if isinstance(value, str | dict | list)}


def special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The fields `bos_token` and the like."""
    tokens = {key: _content(value) for key, value in config.items() if key.endswith("_token")}
    return {key: content for key, content in tokens.items() if content is not None}


def end_tokens(folder: Path) -> set[str]:
    """The tokens that the tokenizer's files in a folder call the end of a text."""
    files = optional_json(folder / TOKENIZER_CONFIG), _token_map(folder)
    return {token for file in files if (token := special_tokens(file).get("eos_token"))}


def end_ids(folder: Path) -> set[int]:
    """The ids that the model's files in a folder call the end of a text: `eos_token_id` of
    generation_config.json and of config.json, and in its part text_config."""
    config = optional_json(folder / CONFIG)
    ids = _ids_of(optional_json(folder / GENERATION_CONFIG))
    for whole in (config, config.get("published")):  # one of ours holds the one it was made from
        if isinstance(whole, Mapping):
            ids |= _ids_of(whole) | _ids_of(whole.get("text_config"))
    return ids


def _ids_of(config: Any) -> set[int]:
    ids = config.get("eos_token_id") if isinstance(config, Mapping) else None
    listed = ids if isinstance(ids, list) else [ids]
    return {number for number in listed if type(number) is int and number >= 0}


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
        named = [(entry.get("name"), entry.get("template")) for entry in entries]
        template = next((text for name, text in reversed(named) if name == "default"), None)
        if entries and template is None:
            names = ", ".join(str(name)[:40] for name, _ in named)
            raise UserError(
                f"{folder / TOKENIZER_CONFIG}: of its chat templates ({names}) none is called"
                " default"
            )
    if template is not None and not isinstance(template, str):
        raise UserError(f"{folder / TOKENIZER_CONFIG}: chat_template must be a string")
    return template


def preprocessor_folder(*folders: Path | None) -> Path | None:
    """The first of the folders that holds a preprocessor_config.json."""
    return next(
        (folder for folder in folders if folder and is_here(folder / PREPROCESSOR_CONFIG)), None
    )
