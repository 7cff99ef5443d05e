"""Promises about hub names: revision, cache, offline mode, and the same distrust as of a file.

There is no network here. A cache is laid out as huggingface_hub does it: snapshots by
commit, and refs that name one.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from fnmatch import fnmatch
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch

from convert.__main__ import main
from mlx_vlm_prune import load
from mlx_vlm_prune.checkpoints import hub
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.checkpoints.hub import resolve_path
from mlx_vlm_prune.scenes import CHECKPOINT

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
        release = generations.release("minimind2-v", False, seed)
        cache(converted(release, folder), "someone/small", commit, ref)
    main_words, old_words = (
        load("someone/small", revision=r)[0].language.norm.weight for r in (None, "v1")
    )
    assert not (main_words == old_words).all().item()
    pinned, _ = load("someone/small", revision=OLDER)
    assert (pinned.language.norm.weight == old_words).all().item()


def test_convert_takes_names_for_all_three_parts(tmp_path, cache, capsys):
    release = generations.release("minimind2-v", True)
    release.write(tmp_path)
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
        resolve_path(name)


def test_a_larger_model_of_drawn_scenes_lies_in_a_clone(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "CLONE", tmp_path)
    with pytest.raises(UserError, match="scenes-deep lies in a clone of the repository, at bench"):
        load("scenes-deep")
    shutil.copytree(CHECKPOINT, tmp_path / "benchmarks" / "models" / "scenes-deep")
    model, processor = load("scenes-deep")
    assert model.N == 196 and processor.is_scenes and processor.name == "scenes-deep"


@pytest.mark.parametrize(
    "name", ["./no/such", "/no/such", "a//b", "a/../b", "a/b/c", "runs/none.pth", "alone"]
)
def test_what_cannot_be_a_hub_name_never_reaches_the_network(name):
    sentence = "there is no .*none.pth$" if name.endswith(".pth") else "is no hub name"
    with pytest.raises(UserError, match=sentence):
        resolve_path(name)


def test_of_several_pth_files_one_must_be_named_before_any_is_downloaded(monkeypatch):
    held = ["README.md", "llm_512.pth", "sft_vlm_512.pth"]
    monkeypatch.setattr(huggingface_hub, "model_info", lambda *_, **__: listing(held))
    with pytest.raises(UserError, match=r"name one, as some/one/llm_512\.pth"):
        resolve_path("some/one")


def listing(names):
    return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])


class Foreign(Exception):
    """Of an HTTP library: each version of the hub's brings another, and some are no OSError."""


def cut(monkeypatch, problem: BaseException, *names: str) -> None:
    """Let these functions of the hub's library raise, unless they are to read the cache alone."""

    def cut_off(real):
        def call(*args, **options):
            if options.get("local_files_only"):
                return real(*args, **options)
            raise problem

        return call

    for name in names:
        monkeypatch.setattr(huggingface_hub, name, cut_off(getattr(huggingface_hub, name)))


BOTH = ("hf_hub_download", "snapshot_download")
PROBLEMS = [Foreign("no route to host\nand a page about it"), Foreign(), ValueError("no JSON")]


@pytest.fixture
def small(tmp_path):
    """A folder that is a repository: a model in one file, and a .pth."""
    folder = tmp_path / "small"
    folder.mkdir()
    for file in ("config.json", "model.safetensors", "weights.pth"):
        (folder / file).write_text("{}")
    return folder


@pytest.mark.parametrize("problem", PROBLEMS, ids=repr)
@pytest.mark.parametrize("broken", [("model_info", *BOTH), BOTH], ids=["at once", "on the way"])
def test_what_the_cache_holds_is_answered_whatever_the_hub_raises(
    cache, small, monkeypatch, broken, problem
):
    cache(small, "some/one")
    cache(small, "some/one", OLDER, "v1")
    monkeypatch.setattr(huggingface_hub, "model_info", lambda *_, **__: listing(["config.json"]))
    cut(monkeypatch, problem, *broken)
    for revision, commit in ((None, COMMIT), ("v1", OLDER), (OLDER, OLDER)):
        assert resolve_path("some/one", revision).name == commit
        assert resolve_path("some/one/weights.pth", revision).parent.name == commit


@pytest.mark.parametrize("problem", PROBLEMS, ids=repr)
@pytest.mark.parametrize(
    ("name", "revision"),
    [("no/such", None), ("some/one", "v2"), ("some/one/no.pth", None), ("no/such/a.pth", None)],
)
def test_what_the_cache_lacks_is_refused_in_one_sentence_whatever_the_hub_raises(
    cache, small, monkeypatch, name, revision, problem
):
    cache(small, "some/one")
    cut(monkeypatch, problem, "model_info", *BOTH)
    with pytest.raises(UserError) as refusal:
        resolve_path(name, revision)
    reason = str(problem).split("\n")[0] or "Foreign"
    assert str(refusal.value).endswith(f"and the hub did not give it: {reason}")
    assert str(refusal.value).startswith(f"{name} is no path here; it is not in the cache")


SHARDS = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
INDEX = "model.safetensors.index.json"
PARTS = {  # files of a snapshot, and whether they are all of it
    "one of two shards": ({INDEX: SHARDS, "model-1.safetensors": ""}, False),
    "both shards": ({INDEX: SHARDS, "model-1.safetensors": "", "model-2.safetensors": ""}, True),
    "an old index beside one file": ({INDEX: SHARDS, "model.safetensors": ""}, True),
    "no weights": ({"config.json": "{}"}, False),
    "a link to what never came": ({"config.json": "{}", "model.safetensors": None}, False),
}


@pytest.mark.parametrize("part", PARTS)
def test_of_a_download_that_was_cut_off_nothing_is_answered(cache, tmp_path, monkeypatch, part):
    files, whole = PARTS[part]
    (folder := tmp_path / "part").mkdir()
    for file, text in files.items():
        if text is not None:
            (folder / file).write_text(text)
    cache(folder, "some/one")
    blobs = tmp_path / "hub-cache" / "models--some--one" / "blobs"
    blobs.mkdir()
    (blobs / "c0ffee.incomplete").write_text("")
    if "model.safetensors" in files and not whole:
        (blobs.parent / "snapshots" / COMMIT / "model.safetensors").symlink_to(blobs / "c0ffee")
    cut(monkeypatch, Foreign("cut off"), "model_info", *BOTH)
    if whole:
        assert resolve_path("some/one").name == COMMIT
    else:
        with pytest.raises(UserError, match="not all of it, and the hub did not give it: cut off"):
            resolve_path("some/one")


def test_a_tokenizer_alone_is_whole(cache, tmp_path, monkeypatch):
    (folder := tmp_path / "words").mkdir()
    (folder / "tokenizer.json").write_text("{}")
    cache(folder, "some/words")
    cut(monkeypatch, Foreign(), "model_info", *BOTH)
    assert resolve_path("some/words").name == COMMIT


def test_weights_that_were_not_wanted_are_not_missed(cache, small, monkeypatch):
    """Newer versions of the hub's library know what a repository holds, and refuse a snapshot
    that lacks what the patterns ask for."""
    cache(small, "some/one")
    real = huggingface_hub.snapshot_download

    def strict(name, *, allow_patterns, **options):
        if any(fnmatch("pytorch_model.bin", pattern) for pattern in allow_patterns):
            raise Foreign("1 file is missing (pytorch_model.bin)")
        return real(name, allow_patterns=allow_patterns, **options)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", strict)
    assert resolve_path("some/one").name == COMMIT


@pytest.mark.parametrize("broken", [("model_info",), BOTH])
def test_an_interrupt_is_no_problem_of_the_hub(cache, small, monkeypatch, broken):
    cache(small, "some/one")
    monkeypatch.setattr(huggingface_hub, "model_info", lambda *_, **__: listing(["config.json"]))
    cut(monkeypatch, KeyboardInterrupt(), *broken)
    with pytest.raises(KeyboardInterrupt):
        resolve_path("some/one")


def test_a_refused_connection_is_no_traceback_in_the_version_that_is_installed(
    cache, small, tmp_path
):
    """What the library itself raises: not in offline mode, but at a closed port of this machine."""
    cache(small, "some/one")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
    program = """
import sys
from mlx_vlm_prune.checkpoints.hub import UserError, resolve_path
for name in sys.argv[1:]:
    try:
        print(resolve_path(name).name)
    except UserError as e:
        print(e)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, "some/one", "some/one/weights.pth", "no/such"],
        env=os.environ
        | {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint}
        | {"HF_HUB_CACHE": str(tmp_path / "hub-cache"), "no_proxy": "*"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    commit, file, refusal = done.stdout.splitlines()
    assert (commit, file) == (COMMIT, "weights.pth")
    assert "the hub did not give it: " in refusal and "refused" in refusal
