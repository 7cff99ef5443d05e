"""Promises about a tokenizer's files: tokens, ends and beginnings of answers are transformers'.

Oracle: transformers over made folders. An answer also ends at the token that either file names.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from mlx_vlm_prune import load
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.checkpoints.processor import read_tokenizer
from mlx_vlm_prune.inputs.prompt import Tokenizer

from . import host_folders

WORDS = ["<unk>", "<s>", "</s>", "<|eot|>", "<|end|>", "one", "two", "im", "age", "<", ">", "|"]
TEXTS = [
    "one two",
    "one</s>two",
    "<|eot|> one",
    "<image>one <image> two",
    "<s>one<|end|>",
    "<image >",
]
IMAGE = len(WORDS)


def write(folder: Path, name: str, content: Any) -> None:
    file = folder / name
    before = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(before | content))


def token(content: str, **flags: bool) -> dict[str, Any]:
    fields = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    return {"content": content, "special": True, **fields, **flags}


def base(folder: Path) -> None:
    words = {word: i for i, word in enumerate(WORDS)}
    backend = Backend(models.BPE(words, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(w, special=True, normalized=False) for w in WORDS[:3]])
    backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    write(folder, "tokenizer_config.json", settings | {"chat_template": "{{ messages }}"})
    write(folder, "config.json", {"model_type": "llava", "text_config": {"model_type": "qwen2"}})


def listed(*contents: str) -> dict[str, Any]:
    numbers = {word: i for i, word in enumerate([*WORDS, "<image>"])}
    return {"added_tokens_decoder": {str(numbers[c]): token(c) for c in contents}}


def generation_config(folder: Path) -> None:
    write(folder, "generation_config.json", {"eos_token_id": [2, 3]})


def config(folder: Path) -> None:
    write(folder, "config.json", {"eos_token_id": 3})


def text_config(folder: Path) -> None:
    text = {"model_type": "qwen2", "eos_token_id": [3, 4]}
    write(folder, "config.json", {"text_config": text})


def special_map(folder: Path) -> None:
    write(folder, "special_tokens_map.json", {"eos_token": "<|eot|>", "bos_token": token("<s>")})


def map_beside_a_list(folder: Path) -> None:
    special_map(folder)
    write(folder, "tokenizer_config.json", listed("<unk>", "<s>", "</s>"))


def image_in_the_list(folder: Path) -> None:
    write(folder, "tokenizer_config.json", listed("<unk>", "<s>", "</s>", "<image>"))


def object_for_a_token(folder: Path) -> None:
    write(
        folder,
        "tokenizer_config.json",
        {"eos_token": {"__type": "AddedToken", **token("<|end|>", rstrip=True)}},
    )


def older_list(folder: Path) -> None:
    write(folder, "added_tokens.json", {"<image>": IMAGE})


def more_special(folder: Path) -> None:
    write(folder, "tokenizer_config.json", {"additional_special_tokens": ["<|eot|>", "<|end|>"]})


def all_of_them(folder: Path) -> None:
    for change in (generation_config, config, image_in_the_list, special_map):
        change(folder)


FOLDERS: list[Callable[[Path], None]] = [
    base, generation_config, config, text_config, special_map, map_beside_a_list,
    image_in_the_list, object_for_a_token, older_list, more_special, all_of_them,
]  # fmt: skip


def numbers(value: int | list[int] | None) -> set[int]:
    return {*value} if isinstance(value, list) else set() if value is None else {value}


def expected_ends(folder: Path, tokenizer: Any) -> set[int]:
    """The union of what transformers reads, and of both files that name a token."""
    settings = AutoConfig.from_pretrained(folder)
    ends = numbers(tokenizer.eos_token_id) | numbers(getattr(settings, "eos_token_id", None))
    ends |= numbers(settings.text_config.eos_token_id)
    if (folder / "generation_config.json").is_file():
        ends |= numbers(GenerationConfig.from_pretrained(folder).eos_token_id)
    files = (folder / name for name in ("tokenizer_config.json", "special_tokens_map.json"))
    named = [json.loads(file.read_text())["eos_token"] for file in files if file.is_file()]
    texts = [value["content"] if isinstance(value, dict) else value for value in named]
    return ends | {*tokenizer.convert_tokens_to_ids(texts)}


@pytest.mark.parametrize("change", FOLDERS)
def test_tokens_ends_and_beginnings_are_transformers_own(change, tmp_path):
    base(tmp_path)
    change(tmp_path)
    ours, theirs = Tokenizer.from_folder(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.eos_token_ids == expected_ends(tmp_path, theirs)
    assert ours.special_tokens.get("bos_token") == theirs.bos_token
    for text in TEXTS:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text
    number = theirs.get_vocab().get("<image>")
    assert read_tokenizer(tmp_path).token_to_id("<image>") == number
    assert number == (IMAGE if change in (image_in_the_list, older_list, all_of_them) else None)


def test_a_model_that_lies_apart_from_its_tokenizer_names_ends_too(tmp_path):
    (tmp_path / "words").mkdir()
    base(tmp_path / "words")
    generation_config(tmp_path)
    assert Tokenizer.from_folder(tmp_path / "words", tmp_path).eos_token_ids == {2, 3}


def test_ids_that_no_token_has_end_nothing(tmp_path):
    base(tmp_path)
    write(tmp_path, "generation_config.json", {"eos_token_id": [2, 9999, -1, True, "x", 1 << 70]})
    assert Tokenizer.from_folder(tmp_path).eos_token_ids == {2}


def test_a_listed_token_that_would_get_another_id_is_refused(tmp_path):
    base(tmp_path)
    write(tmp_path, "tokenizer_config.json", {"added_tokens_decoder": {"77": token("<image>")}})
    with pytest.raises(
        UserError, match=f"'<image>' the id 77, and tokenizer.json leaves it {IMAGE}"
    ):
        read_tokenizer(tmp_path)


def test_several_templates_without_a_default_are_refused(tmp_path):
    base(tmp_path)
    templates = [{"name": "rag", "template": "a"}, {"name": "tool_use", "template": "b"}]
    write(tmp_path, "tokenizer_config.json", {"chat_template": templates})
    with pytest.raises(ValueError, match="default"):
        AutoTokenizer.from_pretrained(tmp_path).apply_chat_template([])
    with pytest.raises(UserError, match=r"chat templates \(rag, tool_use\) none is called default"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("place", ["text_config", "special_tokens_map"])
def test_answers_of_mlx_vlms_models_end_at_every_end(place, tmp_path):
    folder = host_folders.checkpoint("qwen3_vl", tmp_path)
    model, processor = load(folder)
    assert {*processor.tokenizer.stopping_criteria.eos_token_ids} == {host_folders.EOS}
    if place == "text_config":
        text = json.loads((folder / "config.json").read_text())["text_config"]
        write(folder, "config.json", {"text_config": text | {"eos_token_id": [7, 9999]}})
    else:
        write(folder, "special_tokens_map.json", {"eos_token": "w7"})
    model, processor = load(folder)
    criteria = processor.tokenizer.stopping_criteria
    criteria.reset(model.config.eos_token_id)  # as mlx-vlm does before every answer
    assert {*criteria.eos_token_ids} == {host_folders.EOS, 7}
