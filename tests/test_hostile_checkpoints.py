"""Promises about checkpoints from strangers: one sentence, nothing executed, nothing left."""

import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mlx_vlm_prune import load
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.checkpoints.reading.files import read_header
from mlx_vlm_prune.checkpoints.reading.pth import read_pth

from . import tiny
from .test_convert import refused, to_mlx

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def published(tmp_path):
    tiny.publish(tiny.reference(), tmp_path, torch.float16)
    tiny.write_words(tmp_path / "words")
    return tmp_path


def conversion(folder: Path) -> list[Path | str]:
    rest = ["--vision", folder / "clip", "--tokenizer", folder / "words"]
    return ["to-mlx", folder / "published.pth", folder / "mlx", *rest]


def edit(folder: Path, change) -> None:
    """Apply a change to the published state dict."""
    state = torch.load(folder / "published.pth", weights_only=True)
    change(state)
    torch.save(state, folder / "published.pth")


def file_names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


class Payload:
    """Unpickled carelessly, it makes a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_a_pickle_payload_is_refused_and_not_executed(published, capsys):
    trap = published / "executed"
    torch.save({"model.embed_tokens.weight": Payload(trap)}, published / "published.pth")
    assert "nothing in it was executed" in refused(capsys, *conversion(published))
    assert not trap.exists()
    assert "mlx" not in file_names(published)


def test_a_bare_pickle_is_refused_and_not_executed(published, capsys):
    trap = published / "executed"
    (published / "published.pth").write_bytes(pickle.dumps(Payload(trap)))
    assert "is no checkpoint of torch.save" in refused(capsys, *conversion(published))
    assert not trap.exists()


def test_a_compressed_archive_is_refused(published, capsys):
    """195 kB of zip may hold 200 MB of zeros."""
    file = published / "published.pth"
    with zipfile.ZipFile(file) as before:
        parts = {name: before.read(name) for name in before.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as after:
        for name, data in parts.items():
            after.writestr(name, data)
    assert "does not compress" in refused(capsys, *conversion(published))


def test_a_view_that_claims_gigabytes_is_refused(tmp_path):
    torch.save({"a": torch.zeros(1).expand(10**9)}, tmp_path / "a.pth")
    assert (tmp_path / "a.pth").stat().st_size < 5000
    with pytest.raises(UserError, match="claims more than the file holds"):
        read_pth(tmp_path / "a.pth")


def test_many_views_that_together_claim_gigabytes_are_refused(tmp_path):
    whole = torch.zeros(1000)
    torch.save({str(i): whole.view(10, 100) for i in range(1000)}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="together claim more than the file holds"):
        read_pth(tmp_path / "a.pth")


@pytest.mark.parametrize("part", ["../a.safetensors", "/a.safetensors", "b/a.bin", "C:a", "x\\y"])
def test_a_shard_outside_its_folder_is_refused(published, part):
    from mlx_vlm_prune.checkpoints.reading.weights import read_weights

    (published / "clip" / "model.safetensors").rename(published / "a.safetensors")
    index = json.dumps({"weight_map": {"vision_model.x": part}})
    (published / "clip" / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match="outside its folder"):
        read_weights(published / "clip")


@pytest.mark.parametrize("held", [{}, [1, 2], {"a": 3}, {"a": torch.ones(2).to_sparse()}])
def test_a_pth_that_is_no_state_dict_is_refused(tmp_path, held):
    torch.save(held, tmp_path / "a.pth")
    with pytest.raises(UserError):
        read_pth(tmp_path / "a.pth")


def header(about: dict, body: bytes = b"\0" * 8) -> bytes:
    text = json.dumps(about).encode()
    return struct.pack("<Q", len(text)) + text + body


def f32(start: int, end: int, *shape: int) -> dict:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}


BAD_SAFETENSORS = {
    "it has 0 bytes, and": b"",
    "it has 3 bytes, and": b"\1\0\0",
    "header claims 1099511627776 bytes, and the file has 10": struct.pack("<Q", 1 << 40) + b"{}",
    "header claims 18446744073709551615 bytes": b"\xff" * 8 + b"{}",
    "header claims 5 bytes, and the file has 10": struct.pack("<Q", 5) + b"{}",
    "header is not UTF-8": struct.pack("<Q", 3) + b'"\xff"',
    "header is not JSON": struct.pack("<Q", 3) + b"abc",
    "header is no JSON object": struct.pack("<Q", 2) + b"[]",
    "__metadata__ is no object of strings": header({"__metadata__": {"a": 1}, "a": f32(0, 8, 2)}),
    "'a' lacks dtype": header({"a": {"dtype": "F32", "shape": [2]}}),
    "'a' has a dtype that is not known: 'F33'": header({"a": f32(0, 8, 2) | {"dtype": "F33"}}),
    "'a' has a shape that is no list of whole": header({"a": f32(0, 8, 2) | {"shape": [2.0]}}),
    "'a' has a shape that is no list": header({"a": f32(0, 8, 2) | {"shape": "2"}}),
    "'a' has a negative size": header({"a": f32(0, 8, -2, -1)}),
    "'a' has data_offsets that are no": header({"a": f32(8, 0, 2)}),
    "'a' has data_offsets that": header({"a": f32(-8, 0, 2)}),
    "'a' has a shape of more bytes than can be counted": header({"a": f32(0, 8, 1 << 32, 1 << 32)}),
    "'a' has 8 bytes, and its shape .3. takes 12": header({"a": f32(0, 8, 3)}),
    "'a' has 8 bytes, and its shape .4294967298. takes": header({"a": f32(0, 8, (1 << 32) + 2)}),
    "'a' has the shape .4294967298, 0.": header({"a": f32(0, 0, (1 << 32) + 2, 0)}, b""),
    "tensors 'a' and 'b' overlap": header({"a": f32(0, 8, 2), "b": f32(4, 8, 1)}),
    "there are 4 bytes of no tensor before tensor 'b'": header(
        {"a": f32(0, 4, 1), "b": f32(8, 12, 1)}, b"\0" * 12
    ),
    "there are 4 bytes of no tensor before tensor 'a'": header({"a": f32(4, 8, 1)}),
    "there are 72 bytes of no tensor at its end": header({"a": f32(0, 8, 2)}, b"\0" * 80),
    "cut off: 792 bytes are missing": header({"a": f32(0, 800, 200)}),
}  # fmt: skip


@pytest.mark.parametrize("sentence", BAD_SAFETENSORS)
def test_an_unsound_safetensors_file_is_refused_for_its_own_reason(tmp_path, sentence):
    file = tmp_path / "model.safetensors"
    file.write_bytes(BAD_SAFETENSORS[sentence])
    with pytest.raises(UserError, match=f"no sound safetensors file: .*{sentence}"):
        read_header(file)


def test_a_truncated_model_is_refused_by_load(published, capsys):
    target = to_mlx(published)
    file = target / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="no sound safetensors"):
        load(target)


def test_a_missing_tensor_is_named(published, capsys):
    edit(published, lambda state: state.pop("model.layers.1.mlp.up_proj.weight"))
    assert "lacks the tensor language.layers.1.mlp.up_proj" in refused(
        capsys, *conversion(published)
    )


def test_a_misshapen_tensor_is_named_with_both_shapes(published, capsys):
    edit(published, lambda state: state.update({"model.norm.weight": torch.ones(7).half()}))
    sentence = refused(capsys, *conversion(published))
    assert "language.norm.weight is (7,)" in sentence and "(48,)" in sentence


def test_an_unknown_tensor_is_named(published, capsys):
    edit(published, lambda state: state.update({"model.extra": torch.ones(2)}))
    assert "model.extra" in refused(capsys, *conversion(published))


def test_tied_tensors_that_differ_are_refused(published, capsys):
    edit(published, lambda state: state["lm_head.weight"].add_(1))
    assert "lm_head.weight differs" in refused(capsys, *conversion(published))


def test_a_tensor_missing_from_a_folder_of_ours_is_named(published):
    target = to_mlx(published)
    tensors = load_file(target / "model.safetensors")
    tensors.pop("projector.bias")
    save_file(tensors, target / "model.safetensors")
    with pytest.raises(UserError, match=r"lacks the tensor projector\.bias"):
        load(target)


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["to-mlx", "none.pth", "x"], "there is no none.pth"),
        (["to-torch", "none", "x"], "none is none of our checkpoint folders"),
    ],
)
def test_a_source_that_is_not_there_is_named(capsys, tmp_path, monkeypatch, argv, part):
    monkeypatch.chdir(tmp_path)
    assert part in refused(capsys, *argv)


def test_without_a_tower_or_a_tokenizer_it_says_which_option_gives_one(published, capsys):
    only = published / "only"
    only.mkdir()
    (published / "published.pth").rename(only / "published.pth")
    source, target = only / "published.pth", only / "mlx"
    assert "--vision" in refused(capsys, "to-mlx", source, target)
    assert "--tokenizer" in refused(
        capsys, "to-mlx", source, target, "--vision", published / "clip"
    )
