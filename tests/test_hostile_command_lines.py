"""Promises of hostile values on a command line: one sentence, before any work, and no file left."""

import json
import os
import subprocess

import pytest

from convert.__main__ import main as convert
from mlx_vlm_prune import load
from mlx_vlm_prune.chat import main as chat
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.checkpoints.reading.files import check_target, write_atomically
from mlx_vlm_prune.encode import main as encode
from mlx_vlm_prune.evaluate import main as evaluate
from mlx_vlm_prune.generate import main as generate
from mlx_vlm_prune.generation.arguments import build_parser
from mlx_vlm_prune.generation.checkpoint_notes import note_sampling, note_thinking
from mlx_vlm_prune.scenes import CHECKPOINT
from mlx_vlm_prune.sweep import main as sweep

from .entry_points import start_python

NOBODY = "~nosuchuser/x"
DEEP = '{"a":' * 100_000
UNWRITABLE = "/proc/x.json"
LINES = {
    "inspect an empty name": (convert, ["inspect", ""], "name of a model or file is empty"),
    "convert an empty name": (convert, ["to-mlx", "", "x"], "name of a model or file is empty"),
    "an empty tower": (convert, ["inspect", "a.pth", "--vision", ""], "is empty"),
    "an empty tokenizer": (convert, ["to-mlx", "m", "x", "--tokenizer", ""], "is empty"),
    "inspect nobody's": (convert, ["inspect", NOBODY], f"no home folder for {NOBODY}"),
    "generate nobody's": (generate, ["--model", NOBODY, "-p", "x"], f"no home folder for {NOBODY}"),
    "generate an empty name": (generate, ["--model", "", "-p", "x"], "file is empty"),
    "chat with nobody's": (chat, ["--model", NOBODY], f"no home folder for {NOBODY}"),
    "evaluate nobody's": (evaluate, ["--model", NOBODY, "--per-kind", "1"], "no home folder"),
    "encode by nobody's": (encode, ["--model", NOBODY, "--image", "a.png"], "no home folder"),
    "sweep nobody's": (sweep, ["--image", NOBODY, "-p", "x"], "no home folder"),
    "a deep template option": (generate, ["--chat-template-config", DEEP], "nested too deeply"),
    "deep processor options": (generate, ["--processor-kwargs", DEEP], "nested too deeply"),
    "JSON that is no object": (generate, ["--chat-template-config", "[1]"], "is no JSON object"),
    "an answer nowhere": (generate, ["--pruner", "tome", "--json", UNWRITABLE], "cannot write"),
    "a picture nowhere": (generate, ["--overlay", "/proc/x.png"], "cannot write"),
    "a sweep nowhere": (sweep, ["--json", UNWRITABLE], "cannot write"),
    "an evaluation nowhere": (evaluate, ["--out", UNWRITABLE], "cannot write"),
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder to work in, where no model is loaded for a refusal."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    (tmp_path / "a.pth").write_bytes(b"")

    def loaded(*arguments, **options):
        raise AssertionError("a model was loaded before the refusal")

    monkeypatch.setattr("mlx_vlm_prune.hosts.loading.load_folder", loaded)
    return tmp_path


@pytest.mark.parametrize("name", LINES)
def test_it_is_refused_in_a_short_sentence_and_leaves_nothing(name, place, capsys):
    main, line, part = LINES[name]
    before = sorted(place.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        main(line)
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and part in err, err[:500]
    assert len(err) < 400
    assert sorted(place.rglob("*")) == before and not os.path.exists(UNWRITABLE)


def test_the_python_api_refuses_them_too(tmp_path):
    for path in ("", NOBODY):
        with pytest.raises(UserError):
            load(path)


def test_a_place_is_tried_before_the_work_and_stays_as_it_was(tmp_path):
    file = tmp_path / "a.json"
    check_target(file, replace=True)
    assert not [*tmp_path.iterdir()]
    file.write_text("old")
    check_target(file, replace=True)
    assert [*tmp_path.iterdir()] == [file] and file.read_text() == "old"
    with pytest.raises(UserError, match="cannot write"):
        check_target(tmp_path / ("a" * 250), replace=True)


@pytest.mark.parametrize("name", ["D[1]", "*", "?", "a*b[!x]"])
def test_what_a_killed_run_left_is_swept_by_its_own_name_alone(name, tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    left, others = (tmp_path / f".{each}.part-{ended.pid}" for each in (name, "Dx1"))
    left.write_text("left")
    others.write_text("another's")
    write_atomically(tmp_path / name, "text")
    assert not left.exists() and others.read_text() == "another's"


def test_a_folder_in_which_mlx_cannot_compile_is_named(tmp_path):
    line = ["-m", "mlx_vlm_prune.generate", "--max-tokens", "1", "--pruner", "tome"]
    done = start_python(tmp_path, *line, "--keep-tokens", "49", TMPDIR="/proc")
    assert done.returncode == 2, done
    assert done.stderr == (
        "error: MLX cannot compile in /proc: is there room, and a C++ compiler (g++)? TMPDIR names"
        " another folder for temporary files\n"
    )
    assert not [*tmp_path.iterdir()]


# --- options of the chat template, and what a checkpoint wishes -----------------------


def test_thinking_and_template_options_are_put_together():
    line = ["--enable-thinking", "--chat-template-config", '{"a": 1}']
    for order in (line, [*line[1:], line[0]]):
        parsed = build_parser().parse_args(order)
        assert parsed.chat_template_config == {"enable_thinking": True, "a": 1}
    assert build_parser().parse_args([]).chat_template_config is None
    assert build_parser().flags["chat_template_config"] == "--chat-template-config"


class Template:
    def __init__(self, text):
        self.chat_template = text


def test_a_template_that_does_not_think_is_said(caplog):
    caplog.set_level("INFO", "mlx_vlm_prune")
    note_thinking(Template("{% if enable_thinking %}"), {"enable_thinking": True})
    note_thinking(Template("{{ messages }}"), {"enable_thinking": False})
    note_thinking(Template("{{ messages }}"), None)
    assert not caplog.messages
    note_thinking(Template("{{ messages }}"), {"enable_thinking": True})
    assert caplog.messages == ["this model's chat template does not read enable_thinking"]


WISHES = {
    '{"do_sample": true, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "x": 1}': "--temp 0.7"
    " --top-p 0.8 --top-k 20 samples",
    '{"do_sample": true}': "--temp 1 samples",
    '{"do_sample": true, "temperature": "hot", "top_p": null}': "--temp 1 samples",
    '{"do_sample": false, "temperature": 0.7}': None,
    '{"temperature": 0.7}': None,
    "{}": None,
}


@pytest.mark.parametrize("config", WISHES)
def test_a_checkpoint_that_asks_for_sampling_is_answered_greedily_and_it_is_said(
    config, tmp_path, capsys
):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in CHECKPOINT.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "generation_config.json").write_text(config)
    line = ["--model", str(folder), "-p", "is it red ?", "--max-tokens", "1", "--no-verbose"]
    generate(line)
    err, part = capsys.readouterr().err, WISHES[config]
    assert (f"asks for sampling, and answers are greedy here; {part}" in err) == bool(part)
    if part:
        generate([*line, "--temp", "0.5"])
        assert "asks for sampling" not in capsys.readouterr().err


def test_python_is_not_told_of_it_by_a_warning(tmp_path, capsys):
    (tmp_path / "generation_config.json").write_text(json.dumps({"do_sample": True}))

    class Processor:
        folder = tmp_path

    note_sampling(None, Processor(), 0.0)
    assert capsys.readouterr() == ("", "")
