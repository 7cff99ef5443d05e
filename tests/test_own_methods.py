"""Promises of methods of one's own: a file after --pruner, a package's entry point, two files to
begin with; and that nobody else's file is run."""

import argparse
import io
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import torch_ref.pruners as ref
from mlx_vlm_prune import chat, evaluate, generate, load
from mlx_vlm_prune.checkpoints import user_module
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.checkpoints.user_module import file_digests, with_files
from mlx_vlm_prune.evaluation.resume import AnsweredBatch, ResumeFile
from mlx_vlm_prune.generate import main as generate_command
from mlx_vlm_prune.new_method import main as new_method
from mlx_vlm_prune.pruners import METHODS, Signals, listing, plan
from mlx_vlm_prune.pruners.own_methods import method_spec, register_files
from mlx_vlm_prune.scenes import compose

from . import tiny
from .test_verify import SIDE, verify

RAISES = "raise RuntimeError('run')\n"


@pytest.fixture(autouse=True)
def tables(monkeypatch):
    """The tables of methods, as they were before when the test is over."""
    monkeypatch.setattr(user_module, "_files", {})
    before = set(METHODS)
    yield
    for name in METHODS.keys() - before:
        del METHODS[name]
    for name in ref.METHODS.keys() - before:
        del ref.METHODS[name]
        for methods in ref.STAGES.values():
            methods.pop(name, None)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the two files of a new method, where the commands run."""
    monkeypatch.chdir(tmp_path)
    new_method(["mine"])
    return tmp_path


def test_a_new_method_keeps_what_its_formula_says(folder):
    x_BND = np.array([[[3.0, 0], [0, 1], [0, 0], [-3, 0], [0, -1]]], np.float32)
    kept = plan(register_files("./mine.py:power=2")).steps[0](Signals(mx.array(x_BND), (1, 5)), 2)
    assert kept.index_BK.tolist() == [[0, 3]]


def test_a_file_is_a_method_in_every_command_that_takes_one(folder, capsys):
    generate_command(["--pruner", "./mine.py:power=2+restore", "--keep-ratio", "0.25",
                      "--json", "answer.json"])  # fmt: skip
    answer = json.loads((folder / "answer.json").read_text())
    assert answer["pruner"] == "mine:power=2.0+restore" and answer["visual_tokens_kept"] == 49
    evaluate.main(["--per-kind", "1", "--pruner", "random", "./mine.py", "mine.py+restore",
                   "--keep-tokens", "49", "--out", "result.json"])  # fmt: skip
    rows = json.loads((folder / "result.json").read_text())["rows"]
    assert {"random", "mine", "mine+restore"} <= {row["pruner"] for row in rows}
    capsys.readouterr()
    listing.main(["./mine.py"])
    assert "power=1  exponent of a token's distance to the mean" in capsys.readouterr().out
    assert with_files("mine:power=2.0+restore") == f"{folder}/mine.py:power=2.0+restore"
    assert register_files(f"{folder}/mine.py") == "mine"  # the same file again


def test_both_files_agree_on_a_model_and_a_wrong_twin_does_not(tmp_path_factory, folder, capfd):
    desk = tmp_path_factory.mktemp("desk")
    tiny.checkpoint(tiny.taught(tiny.reference()), desk)
    compose(0).image().resize((SIDE, SIDE)).save(desk / "photo.png")
    pair = [desk / "published.pth", desk / "mlx", "--vision", desk / "clip", "--image",
            desk / "photo.png", "--keep-ratio", 0.6, "--pruner", "./mine.py:power=2"]  # fmt: skip
    assert verify(*pair) == 0
    assert "1 of 1 methods agree" in capfd.readouterr().out
    twin = folder / "mine_torch.py"
    twin.write_text(twin.read_text().replace("distance_N**power", "-(distance_N**power)"))
    assert verify(*pair) == 1
    twin.unlink()
    capfd.readouterr()
    assert verify(*pair) == 2
    assert "mine.py has no twin in PyTorch; write mine_torch.py beside it" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "there is no file"),
        ("def prune(:", "SyntaxError"),
        ("import nothing_of_this_name", "No module named 'nothing_of_this_name'"),
        ("x = 1", "has no stage"),
        ("import sys\nsys.exit(3)", "fails: SystemExit: 3"),
        ("raise ValueError('a\\nb')", "fails: ValueError: a"),
        ("from mlx_vlm_prune import Stage\nstage = Stage.FEATURES", "must have"),
    ],
)
def test_a_file_that_is_no_method_ends_in_one_sentence(tmp_path, capsys, text, sentence):
    if text is not None:
        (tmp_path / "broken.py").write_text(text)
    with pytest.raises(SystemExit) as stop:
        generate_command(["--pruner", f"{tmp_path}/broken.py", "--keep-ratio", "0.5"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and sentence in error and error.count("\n") == 1


def test_names_that_are_taken_or_no_names_are_refused(tmp_path, folder, capsys):
    (tmp_path / "norm.py").write_text((folder / "mine.py").read_text())
    for spec, sentence in (("norm.py", "is called norm already"), ("my-method.py", "no file")):
        with pytest.raises(argparse.ArgumentTypeError, match=sentence):
            method_spec(spec)
    for name, sentence in (("norm", "is called norm already"), ("a-b", "cannot name a pruner"),
                           ("mine", "mine.py exists already")):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            new_method([name])
        assert stop.value.code == 2 and sentence in capsys.readouterr().err
    assert not (folder / "norm_torch.py").exists()


def test_neither_a_request_nor_a_checkpoint_runs_a_file(tmp_path):
    file = tmp_path / "stranger.py"
    file.write_text(RAISES)
    model, processor = load()
    with pytest.raises(UserError, match="no pruner is called"):
        generate(model, processor, "What?", compose(0).image(), pruner=str(file), keep_ratio=0.5)
    with pytest.raises(UserError, match="no pruner is called"):
        plan(f"{file}:step=1+norm")


def test_answers_of_an_earlier_version_of_a_file_are_not_taken_for_the_new_ones(folder):
    def part_file() -> Path:
        return ResumeFile(folder / "result.json", {"a": 1}, AnsweredBatch).path

    before = part_file()
    register_files("./mine.py")
    first = part_file()
    text = (folder / "mine.py").read_text()
    (folder / "mine.py").write_text(text.replace("(apart_BND).sum", "(-apart_BND).sum"))
    assert part_file() == first  # what was run is still the earlier version
    register_files("./mine.py")
    assert len({before, first, part_file()}) == 3


def test_a_file_that_has_changed_is_run_again(folder):
    x_BND = mx.array([[[3.0, 0], [0, 1], [0, 0], [-3, 0], [0, -1]]])
    signals = Signals(x_BND, (1, 5))
    assert plan(register_files("./mine.py")).steps[0](signals, 2).index_BK.tolist() == [[0, 3]]
    text = (folder / "mine.py").read_text()
    (folder / "mine.py").write_text(text.replace("mx.power(", "-mx.power("))
    assert plan(register_files("./mine.py")).steps[0](signals, 2).index_BK.tolist() == [[1, 2]]
    assert file_digests("mine+restore") == file_digests() and file_digests("norm") == {}


def test_an_installed_package_brings_a_method_in_by_its_entry_point(folder, monkeypatch, capsys):
    (folder / "theirs_package.py").write_text((folder / "mine.py").read_text())
    info = folder / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[mlx_vlm_prune.pruners]\nfarthest = theirs_package\nbroken = nowhere_to_be_found\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    assert plan("farthest:power=2+restore").spec == "farthest:power=2.0+restore"
    with pytest.raises(UserError, match="the pruner broken of nowhere_to_be_found fails: ModuleNo"):
        plan("broken")
    with pytest.raises(UserError, match="did you mean farthest"):
        plan("farthes")
    listing.main([])
    shown = capsys.readouterr().out
    assert "\nfarthest " in shown and "the pruner broken of nowhere_to_be_found fails" in shown


def test_places_that_read_as_a_chain_are_refused(tmp_path, folder, capsys):
    place = tmp_path / "c++"
    place.mkdir()
    (place / "mine.py").write_text((folder / "mine.py").read_text())
    with pytest.raises(argparse.ArgumentTypeError, match="reads as a chain; move it"):
        method_spec(str(place / "mine.py"))
    with pytest.raises(SystemExit):
        new_method(["other", "--out", str(place)])
    assert "has + in it" in capsys.readouterr().err and not (place / "other.py").exists()


def test_lines_from_a_pipe_run_no_file(folder, monkeypatch, capsys):
    (folder / "stranger.py").write_text(RAISES)
    monkeypatch.setattr("sys.stdin", io.StringIO("/pruner ./stranger.py\n"))
    chat.main([])
    assert "no pruner is called './stranger" in capsys.readouterr().err
