"""Refusals of `convert prune-into`: one sentence, exit code 2, and nothing is left."""

import json
from pathlib import Path

import pytest

from convert.__main__ import main
from mlx_vlm_prune.inputs import budget


@pytest.fixture
def source(tmp_path) -> Path:
    """A folder as far as it is read."""
    return write_folder(tmp_path / "source", {"model_type": "llava"})


def write_folder(folder: Path, config: dict) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    return folder


def refused(capsys, *words) -> str:
    """The one sentence."""
    with pytest.raises(SystemExit) as end:
        main(["prune-into", *map(str, words)])
    captured = capsys.readouterr()
    assert end.value.code == 2 and not captured.out
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    return captured.err


NORM = ("--pruner", "norm", "--keep-ratio", "0.5")
BUDGET = ("--keep-ratio", "0.5")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--pruner", "divprun", *BUDGET], "did you mean divprune"),
        (["--pruner", "norm:seed=1", *BUDGET], "norm has no option 'seed'"),
        (["--pruner", "none", *BUDGET], "none prunes nothing"),
        (["--pruner", "fastv", *BUDGET], "fastv cannot be written into a checkpoint: it works"),
        (["--pruner", "divprune+fastv", *BUDGET], "between the language model's layers"),
        (["--pruner", "downsample", *BUDGET], "it makes the picture smaller"),
        (["--pruner", "norm+fastv+restore", *BUDGET], "fastv cannot be written"),
        (["--pruner", "norm+restore:published", *BUDGET], "mlx-vlm's share a mask"),
        (["--pruner", "two_scales", *BUDGET], "two_scales cannot prune a llava model: it needs"),
        (["--pruner", "two_scales+restore", *BUDGET], "the pixels of patches after the tower"),
        (["--pruner", "score_prune", *BUDGET], "score_prune is learned"),
        (["--pruner", "cls_attention:layer=0.5", *BUDGET], "takes an int, not '0.5'"),
        (["--pruner", "norm", "--keep-ratio", "0"], "must be above 0 and at most 1"),
        (["--pruner", "norm", "--keep-ratio", "1.5"], "must be above 0 and at most 1"),
        (["--pruner", "norm", "--keep-ratio", "nan"], "must be above 0 and at most 1"),
        (["--pruner", "norm", "--keep-tokens", "0"], "it must be a whole number, at least 1"),
        (["--pruner", "norm", "--keep-tokens", "few"], "invalid int value"),
        ([*NORM, "--keep-tokens", "4"], "not allowed with"),
        (["--keep-ratio", "1"], "none prunes nothing"),
    ],
)
def test_what_cannot_be_asked(source, tmp_path, capsys, words, sentence):
    assert sentence in refused(capsys, source, tmp_path / "new", *words)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"model_type": "mllama"}, "it reads images by cross-attention"),
        ({"model_type": "unheard_of"}, "is a unheard_of model; prune-into knows mlx-vlm's llava"),
        ({"model_type": ["llava"]}, "prune-into knows mlx-vlm's"),
        ({}, "has no model_type in config.json; prune-into knows mlx-vlm's llava"),
        ({"model_type": "llava", "model_file": "own.py"}, "a model of its own in own.py"),
        ({"model_type": "llava", "mlx_vlm_prune": {}}, "prunes already"),
        ({"model_type": "llava", "vision_feature_layer": [3, 7]}, "vision_feature_layer is [3, 7]"),
        ({"model_type": "llava", "vision_feature_select_strategy": "full"}, "not the patches"),
        ({"model_type": "smolvlm"}, "tokenizer.json"),
    ],
)
def test_what_cannot_be_pruned(tmp_path, capsys, config, sentence):
    folder = write_folder(tmp_path / "source", config)
    assert sentence in refused(capsys, folder, tmp_path / "new", *NORM)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_a_tokenizer_that_does_not_mark_the_last_tile(tmp_path, capsys):
    folder = write_folder(tmp_path / "source", {"model_type": "idefics3"})
    (folder / "tokenizer.json").write_text('{"added_tokens": [{"id": 1, "content": "<x>"}]}')
    assert "has no <global-img>" in refused(capsys, folder, tmp_path / "new", *NORM)


def test_folders_that_are_not_there_or_hold_no_model(tmp_path, capsys):
    new = tmp_path / "new"
    assert "there is no folder" in refused(capsys, tmp_path / "gone", new, *NORM)
    (tmp_path / "empty").mkdir()
    assert "cannot read" in refused(capsys, tmp_path / "empty", new, *NORM)
    (tmp_path / "empty" / "config.json").write_text("{")
    assert "is not valid JSON" in refused(capsys, tmp_path / "empty", new, *NORM)
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "llava"}')
    assert "holds no .safetensors" in refused(capsys, tmp_path / "empty", new, *NORM)


def test_nothing_is_overwritten(source, tmp_path, capsys):
    existing = tmp_path / "there"
    existing.mkdir()
    (existing / "mine.txt").write_text("mine")
    assert "exists already" in refused(capsys, source, existing, *NORM)
    assert "exists already" in refused(capsys, source, source, *NORM)
    assert "there is no folder" in refused(capsys, source, tmp_path / "a" / "b", *NORM)
    assert [p.name for p in existing.iterdir()] == ["mine.txt"]
    assert "lies inside" in refused(capsys, source, source / "inside", *NORM)
    assert not (source / "inside").exists()


def test_a_full_disk_leaves_nothing(source, tmp_path, capsys, monkeypatch):
    (source / "tokenizer.json").write_text("{}")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full)
    assert "No space left on device; nothing was left" in refused(
        capsys, source, tmp_path / "new", *NORM
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize("pruner", ["divprune", "visionzip"])
@pytest.mark.parametrize(
    ("option", "needs"),
    [((), "it needs mlx_vlm_prune where it is run"), (("--vendor",), "it runs the copy of")],
)
def test_it_says_what_was_written_and_that_it_will_be_executed(
    source, tmp_path, capsys, pruner, option, needs
):
    main(["prune-into", str(source), str(tmp_path / "new"), "--pruner", pruner, *BUDGET, *option])
    output = capsys.readouterr().out
    assert f"keeps 0.5 of an image's visual tokens by {pruner}" in output and needs in output
    assert "warning: mlx-vlm executes pruned.py whenever it loads this folder" in output
    assert (tmp_path / "new" / "pruned.py").is_file()
    assert (tmp_path / "new" / "mlx_vlm_prune").is_dir() is bool(option)


def test_without_a_budget_it_keeps_half_and_says_so(source, tmp_path, capsys):
    budget.default_keep_ratio.cache_clear()
    main(["prune-into", str(source), str(tmp_path / "new"), "--pruner", "norm"])
    printed = capsys.readouterr()
    assert printed.err == "note: norm has no budget and keeps --keep-ratio 0.5\n"
    assert "a pruned.py that keeps 0.5 of an image's visual tokens by norm\n" in printed.out
    text = (tmp_path / "new" / "pruned.py").read_text(encoding="utf-8")
    assert "keeps 0.5 of each image's visual tokens, by norm." in text
    assert "KEEP_RATIO, KEEP_TOKENS = 0.5, None" in text
    config = json.loads((tmp_path / "new" / "config.json").read_text(encoding="utf-8"))
    assert config["mlx_vlm_prune"]["keep_ratio"] == 0.5
