"""Promises of the examples: each is short, runs as it is, and does what its first line says."""

import json
import re
import runpy
import sys
from pathlib import Path
from unittest.mock import patch

import pytest

from mlx_vlm_prune import PRUNERS, Stage

from . import host_folders

FOLDER = Path(__file__).resolve().parents[1] / "examples"
LONGEST = 60
FILES = sorted(file.name for file in FOLDER.iterdir() if file.suffix in (".py", ".ipynb"))
NOTEBOOK = "explorer.ipynb"


def cells() -> list[str]:
    """The code of the notebook."""
    notebook = json.loads((FOLDER / NOTEBOOK).read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs an example as `python examples/NAME` does, in an empty folder; the lines it prints."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *arguments: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", [str(FOLDER / name), *arguments])
        runpy.run_path(str(FOLDER / name), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    with patch.dict(PRUNERS):  # which an example adds to
        yield run


def test_the_list_has_every_example_and_each_is_short():
    listed = re.findall(r"^\| \[([\w.]+)\]\(\1\)", (FOLDER / "README.md").read_text(), re.M)
    assert sorted(listed) == FILES
    lengths = {name: len((FOLDER / name).read_text().splitlines()) for name in FILES}
    lengths[NOTEBOOK] = sum(len(cell.splitlines()) for cell in cells())
    assert all(length < LONGEST for length in lengths.values()), lengths


def test_every_example_is_run_here():
    text = Path(__file__).read_text(encoding="utf-8")
    assert all(f'run("{name}"' in text for name in FILES if name != NOTEBOOK)


def test_a_question_is_answered_full_and_pruned(run, tmp_path):
    full, pruned, _ = run("answer_pruned.py")
    assert "from 196 of 196 visual tokens" in full and "from 49 of 196 visual tokens" in pruned
    assert re.fullmatch(r"full: '\w+' from .* ms", full) and (tmp_path / "kept.png").is_file()


def test_every_method_has_a_line(run):
    lines = run("all_methods.py")
    methods = [name for name, method in PRUNERS.items() if method.stage is not Stage.ENHANCER]
    assert [line.split()[0] for line in lines] == methods
    answered = [line for line in lines if " of 196 " in line]
    assert len(answered) > 0.8 * len(lines) and " 98 of 196 " in answered[-1]


@pytest.mark.filterwarnings("ignore")  # transformers' own
def test_mlx_vlm_prunes_in_its_own_loop(run, tmp_path):
    pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")
    model = host_folders.checkpoint("qwen2_5_vl", tmp_path)
    picture = host_folders.picture(tmp_path, "a.png", 112, 112)
    *answers, report = run("prune_mlx_vlm.py", str(model), str(picture), "w7 w9")
    assert [line.split(":")[0] for line in answers] == ["full", "pruned"]
    assert report == "Visual tokens: 16 -> 4 (75.0% pruned)"


def test_a_method_of_ones_own_prunes(run, tmp_path):
    lines = run("new_method.py")
    assert "98" in " ".join(lines) and (tmp_path / "sample-kept.png").is_file()


def test_a_learned_pruner_is_trained_and_asked(run, tmp_path):
    pytest.importorskip("yaml", reason="PyYAML is not installed")
    lines = run("train_pruner.py", "2")
    assert len([line for line in lines if "(right: " in line]) > 1
    assert (tmp_path / "trained-pruner" / "pruners.safetensors").is_file()


def test_a_server_is_asked_by_openais_client_and_ended(run):
    for name in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    lines = run("serve_and_ask.py")
    assert [line.split(" visual")[0] for line in lines] == [
        "196 of 196", "98 of 196", "49 of 196",
    ]  # fmt: skip
    assert all(line.split(": ")[1] for line in lines)


def test_where_the_server_cannot_start_its_sentence_is_shown(run, tmp_path, capsys):
    for name in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    (tmp_path / "a.png").touch()
    with pytest.raises(SystemExit) as stop:
        run("serve_and_ask.py", "a.png", "What is this?", "no/such/folder")
    assert stop.value.code == 2 and "no/such/folder" in capsys.readouterr().err


def test_the_notebook_shows_the_explorer(tmp_path, monkeypatch, capsys):
    """Its cells in order, without a kernel; what the last expression shows is the page."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    *before, last = cells()
    for code in before:
        exec(compile(code, NOTEBOOK, "exec"), names)
    assert capsys.readouterr().out.splitlines()[0].split()[:2] == ["none", "196"]
    shown = eval(compile(last, NOTEBOOK, "eval"), names)
    assert shown._repr_html_().startswith("<iframe") and "divprune" in shown.page()


def test_the_notebook_is_one_and_holds_no_outputs():
    notebook = json.loads((FOLDER / NOTEBOOK).read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert all(cell["cell_type"] in ("code", "markdown") for cell in notebook["cells"])
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    assert not any(cell.get("outputs") for cell in notebook["cells"])
