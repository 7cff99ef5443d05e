"""Promises about hub names: revision, cache, offline mode, and the same distrust as of a file.

There is no network here. A cache is laid out as huggingface_hub does it: snapshots by
commit, and refs that name one.
"""

import shutil

import pytest
import torch

from convert.__main__ import main
from mlx_vlm_prune import load
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.checkpoints.hub import found

from . import generations
from .test_generations import converted

COMMIT, OLDER = "a" * 40, "b" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and a function that puts a folder into it as owner/name."""
    from huggingface_hub import constants, file_download

    home = tmp_path / "hub-cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home))
    assert file_download.constants is constants

    def put(folder, name: str, commit: str = COMMIT, ref: str = "main"):
        place = home / ("models--" + name.replace("/", "--"))
        shutil.copytree(folder, place / "snapshots" / commit)
        (place / "refs").mkdir(exist_ok=True)
        (place / "refs" / ref).write_text(commit)

    return put


def test_a_model_is_loaded_by_its_name_from_the_cache(tmp_path, cache, capsys):
    cache(converted(generations.release("minimind-3v", False), tmp_path), "someone/small")
    model, processor = load("someone/small")
    assert model.config.text.qk_norm and processor.name == "someone/small"


def test_a_revision_chooses_among_them(tmp_path, cache, capsys):
    for commit, ref, seed in ((COMMIT, "main", 0), (OLDER, "v1", 1)):
        folder = tmp_path / ref
        folder.mkdir()
        made = generations.release("minimind2-v", False, seed)
        cache(converted(made, folder), "someone/small", commit, ref)
    main_words, old_words = (
        load("someone/small", revision=r)[0].language.norm.weight for r in (None, "v1")
    )
    assert not (main_words == old_words).all().item()
    pinned, _ = load("someone/small", revision=OLDER)
    assert (pinned.language.norm.weight == old_words).all().item()


def test_convert_takes_names_for_all_three_parts(tmp_path, cache, capsys):
    made = generations.release("minimind2-v", True)
    made.write(tmp_path)
    (tmp_path / "weights").mkdir()
    (tmp_path / "published.pth").rename(tmp_path / "weights" / "sft_vlm_48.pth")
    cache(tmp_path / "weights", "jingyaogong/MiniMind2-V-PyTorch")
    cache(tmp_path / "tower", "openai/clip-vit-base-patch16")
    cache(tmp_path / "words", "jingyaogong/MiniMind2-V")
    parts = ["--vision", "openai/clip-vit-base-patch16", "--tokenizer", "jingyaogong/MiniMind2-V"]
    source = "jingyaogong/MiniMind2-V-PyTorch"
    main(["to-mlx", source, str(tmp_path / "a"), *parts])
    main(["to-mlx", f"{source}/sft_vlm_48.pth", str(tmp_path / "b"), *parts])
    a, b = (tmp_path / x / "model.safetensors" for x in "ab")
    assert a.read_bytes() == b.read_bytes()
    assert f"base_model: {source}" in (tmp_path / "a" / "README.md").read_text()
    capsys.readouterr()
    main(["inspect", f"{source}/sft_vlm_48.pth"])
    assert "2 of 4 a token" in capsys.readouterr().out


def test_what_the_hub_holds_is_distrusted_like_any_file(tmp_path, cache):
    from .test_hostile_checkpoints import Payload

    (tmp_path / "bad").mkdir()
    torch.save({"a": Payload(tmp_path / "executed")}, tmp_path / "bad" / "pytorch_model.bin")
    cache(tmp_path / "bad", "some/stranger")
    with pytest.raises(UserError, match="nothing in it was executed"):
        load("some/stranger")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["no/such", "no/such/file.pth"])
def test_a_name_that_is_not_in_the_cache_is_refused_in_one_sentence(cache, name):
    with pytest.raises(UserError, match="the hub did not give it"):
        found(name)


@pytest.mark.parametrize(
    "name", ["./no/such", "/no/such", "a//b", "a/../b", "a/b/c", "runs/none.pth", "alone"]
)
def test_what_cannot_be_a_hub_name_never_reaches_the_network(name):
    with pytest.raises(UserError, match="is no hub name"):
        found(name)


def test_of_several_pth_files_one_must_be_named_before_any_is_downloaded(monkeypatch):
    import huggingface_hub

    held = ["README.md", "llm_512.pth", "sft_vlm_512.pth"]
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda *_, **__: held)
    with pytest.raises(UserError, match=r"name one, as some/one/llm_512\.pth"):
        found("some/one")
