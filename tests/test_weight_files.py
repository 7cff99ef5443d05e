"""Promises about which files of a folder are read: those that transformers reads, or none.

Oracle: transformers' own selection of files, and the tensors in them.
"""

import json
import os
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from convert.describe import describe
from mlx_vlm_prune import load
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.checkpoints.families import read_checkpoint
from mlx_vlm_prune.checkpoints.reading.weights import read_weights
from mlx_vlm_prune.encode import load_dual_encoder
from mlx_vlm_prune.evaluation.questions import BadRecords, Source, mme, pope
from mlx_vlm_prune.hosts.linked_folder import mlx_vlm_weight_files
from mlx_vlm_prune.hosts.pruned_folder import prune_into
from torch_ref.models.loading import load_folder

from . import dual_encoders, host_folders, llava, tiny

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
SHARDS = tuple(f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12345\n"


def other(folder: Path) -> dict[str, torch.Tensor]:
    """The same names with other values."""
    return {name: tensor + 1 for name, tensor in load_file(folder / WHOLE).items()}


def stray(folder: Path, name: str) -> None:
    save_file(other(folder), folder / name, metadata={"format": "pt"})


def stale_index(folder: Path) -> None:
    """Shards of an older model, with their index, beside the whole file."""
    split(folder, other(folder))


def split(folder: Path, tensors: dict[str, torch.Tensor], twice: str | None = None) -> None:
    """Two shards and their index; `twice` is a name that both hold."""
    names = sorted(tensors)
    halves = names[::2], names[1::2]
    for file, half in zip(SHARDS, halves, strict=True):
        held = {name: tensors[name] for name in half} | ({twice: tensors[twice]} if twice else {})
        save_file(held, folder / file, metadata={"format": "pt"})
    places = {name: file for file, half in zip(SHARDS, halves, strict=True) for name in half}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def sharded(folder: Path) -> None:
    split(folder, load_file(folder / WHOLE))
    (folder / WHOLE).unlink()


def sharded_and_stray(folder: Path) -> None:
    stray(folder, "model_old.safetensors")
    sharded(folder)


def twice(folder: Path) -> None:
    tensors = load_file(folder / WHOLE)
    split(folder, tensors, twice=sorted(tensors)[0])
    (folder / WHOLE).unlink()


def shard_missing(folder: Path) -> None:
    sharded(folder)
    (folder / SHARDS[1]).unlink()


def without_index(folder: Path) -> None:
    sharded(folder)
    (folder / INDEX).unlink()


def missing(folder: Path) -> None:
    stray(folder, "model_old.safetensors")
    (folder / WHOLE).unlink()


def pointer(folder: Path) -> None:
    (folder / WHOLE).write_text(POINTER)


def pointer_in_a_shard(folder: Path) -> None:
    sharded(folder)
    (folder / SHARDS[0]).write_text(POINTER)


def adapter_only(folder: Path) -> None:
    (folder / WHOLE).rename(folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "base_model_name_or_path": "owner/base"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def adapter_beside(folder: Path) -> None:
    stray(folder, "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "base_model_name_or_path": "owner/base"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def pickle_beside(folder: Path) -> None:
    torch.save(other(folder), folder / "pytorch_model.bin")


def foreign_disk(folder: Path) -> None:
    for name in (WHOLE, "model2.safetensors", "model.pth"):
        (folder / f"._{name}").write_bytes(b"\0\5\x16\7Mac OS X")


def pipe(folder: Path) -> None:
    (folder / WHOLE).unlink()
    os.mkfifo(folder / WHOLE)


def nowhere(folder: Path) -> None:
    """As in a cache of the hub that lost a file; beside it other weights."""
    torch.save(other(folder), folder / "pytorch_model.bin")
    (folder / WHOLE).unlink()
    (folder / WHOLE).symlink_to(folder / "nothing")


CHANGES = {
    "as it is": lambda folder: None,
    "model_old": lambda folder: stray(folder, "model_old.safetensors"),
    "model2": lambda folder: stray(folder, "model2.safetensors"),
    "model_ema": lambda folder: stray(folder, "model_ema.safetensors"),
    "model-00001-of-00001": lambda folder: stray(folder, "model-00001-of-00001.safetensors"),
    "consolidated": lambda folder: stray(folder, "consolidated.safetensors"),
    "stale index": stale_index, "sharded": sharded, "sharded and stray": sharded_and_stray,
    "twice": twice, "shard missing": shard_missing, "without index": without_index,
    "missing": missing, "pointer": pointer, "pointer in a shard": pointer_in_a_shard,
    "adapter only": adapter_only, "adapter beside": adapter_beside,
    "pickle beside": pickle_beside, "foreign disk": foreign_disk, "nowhere": nowhere,
    "pipe": pipe,
}  # fmt: skip
SENTENCES = {
    "twice": "twice", "shard missing": "there is no", "without index": "without model.safetensors",
    "missing": "is no checkpoint", "pointer": "Git LFS", "pointer in a shard": "Git LFS",
    "adapter only": "an adapter only; give the model that it was trained for of owner/base",
    "adapter beside": "merge it", "nowhere": "a link to nothing", "pipe": "not a regular file",
}  # fmt: skip
READ = [change for change in CHANGES if change not in SENTENCES]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return llava.write(llava.random_model(), tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return tiny.checkpoint(tiny.reference(), tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return host_folders.checkpoint("qwen2_5_vl", tmp_path_factory.mktemp("host"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return dual_encoders.write(dual_encoders.random_clip(), tmp_path_factory.mktemp("clip"))


@pytest.fixture
def changed(tmp_path):
    def change(source: Path, name: str) -> Path:
        folder = shutil.copytree(source, tmp_path / "changed")
        CHANGES[name](folder)
        return folder

    return change


def loaded(folder: Path) -> dict[str, np.ndarray]:
    model, _ = load(folder, dtype="float32")
    return {name: np.array(array) for name, array in tree_flatten(model.parameters())}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("change", CHANGES)
def test_every_reader_of_a_llava_reads_what_transformers_reads_or_refuses(
    change, published, changed
):
    folder = changed(published, change)
    readers = {
        "load": lambda: loaded(folder),
        "read_checkpoint": lambda: read_checkpoint(folder).tensors,
        "torch_ref": lambda: load_folder(folder, torch.device("cpu")),
        "describe": lambda: describe(folder),
        "read_weights": lambda: read_weights(folder),
    }
    if change in SENTENCES:
        for read in readers.values():
            with pytest.raises(UserError, match=SENTENCES[change]):
                read()
        return
    theirs = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    expected = llava.write(theirs, folder.parent / "expected")
    assert same(loaded(folder), loaded(expected))
    assert read_checkpoint(folder).tensors == read_checkpoint(expected).tensors
    assert read_weights(folder) == read_weights(expected)
    assert describe(folder) == describe(expected)
    (ours, _), (right, _) = (load_folder(f, torch.device("cpu")) for f in (folder, expected))
    states = ours.state_dict(), right.state_dict()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


@pytest.mark.parametrize("change", CHANGES)
def test_our_own_folders_follow_the_same_rule(change, scenes, changed):
    folder = changed(scenes, change)
    if change in SENTENCES:
        for read in (load, read_checkpoint, read_weights, describe, load_folder):
            with pytest.raises(UserError, match=SENTENCES[change]):
                read(folder)
        return
    assert same(loaded(folder), loaded(scenes))
    assert read_checkpoint(folder).tensors == read_checkpoint(scenes).tensors


@pytest.mark.parametrize("change", CHANGES)
def test_a_whole_clip_follows_the_same_rule(change, clip, changed):
    folder = changed(clip, change)
    if change in SENTENCES:
        with pytest.raises(UserError, match=SENTENCES[change]):
            load_dual_encoder(folder, "clip")
        return
    both = (load_dual_encoder(f, "clip", "float32")[0] for f in (folder, clip))
    ours, right = (dict(tree_flatten(model.parameters())) for model in both)
    assert all(mx.array_equal(ours[name], right[name]) for name in right)


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_of_mlx_vlms_is_read_as_transformers_selects_or_refused(change, host, changed):
    """Its loader reads every .safetensors, and an index before the whole file."""
    folder = changed(host, change)
    try:
        weights = loaded(folder)
    except UserError as e:
        if change in SENTENCES:
            assert SENTENCES[change] in str(e) or "holds no .safetensors" in str(e)
        else:
            assert change in ("stale index", *(c for c in CHANGES if c.startswith("model")))
            assert "mlx-vlm would read" in str(e)
        with pytest.raises(UserError):
            prune_into(folder, folder.parent / "pruned", "norm", keep_ratio=0.5)
        with pytest.raises(UserError):
            mlx_vlm_weight_files(folder)
        return
    assert change not in SENTENCES
    assert same(weights, loaded(host))


def test_files_of_a_foreign_disk_are_no_questions(tmp_path):
    (tmp_path / "pope").mkdir()
    lines = {"question_id": 1, "image": "a.png", "text": "Is it?", "label": "yes"}
    (tmp_path / "pope" / "coco_pope_random.json").write_text(json.dumps(lines))
    (tmp_path / "pope" / "._coco_pope_random.json").write_bytes(b"\0\5\x16\7")
    assert [file.name for file in pope.find_files(tmp_path / "pope", "*pope*.json*")] == [
        "coco_pope_random.json"
    ]
    task = tmp_path / "existence"
    task.mkdir()
    host_folders.picture(task, "0001.jpg", 8, 8)
    (task / "0001.txt").write_text("Is it?\tYes\nIs it not?\tNo\n")
    (task / "._0001.txt").write_bytes(b"\0\5\x16\7")
    bad = BadRecords()
    assert len([*mme.read(Source(tmp_path), bad)]) == 2
    assert not bad.messages
