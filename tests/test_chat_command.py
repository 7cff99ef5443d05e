"""Promises of the command `chat`: lines typed or piped, a sentence for a mistake, and Ctrl-C stops
an answer alone."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from mlx_vlm_prune import Chat, load
from mlx_vlm_prune.chat import HELP, Session, main, typed_lines
from mlx_vlm_prune.scenes import compose

from . import tiny
from .entry_points import start_python
from .test_chat import scratch, write_pictures

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two pictures and a tiny model (`mlx`)."""
    folder = tmp_path_factory.mktemp("chat")
    write_pictures(folder)
    tiny.checkpoint(tiny.reference(), folder)
    return folder


@pytest.fixture(scope="module")
def loaded(home):
    return load(home / "mlx", dtype="float32")


def test_bad_lines_are_a_sentence_each_and_the_chat_goes_on(home, loaded, capsys, monkeypatch):
    monkeypatch.chdir(home)
    chat = Chat(*loaded, max_tokens=3)
    # fmt: off
    lines = ["/stats", "/imag a.png", "/image no.png", "/keep", "/pruner none", "/keep 0.5",
             "/pruner norm",
             "/keep 40", "/keep 0", "/pruner nom", "/overlay a.jpg", "", "/image 'a.png'",
             "two <image> <image> ?", "how many stars ?", "/keep 5\n", "is it red ?", "/stats",
             "/overlay", "/overlay nowhere/a.png", "/clear", "a ?", "/help", "/quit", "b ?"]
    # fmt: on
    Session(chat, loaded[1]).run(lines)
    out, err = capsys.readouterr()
    err = err.replace(f"{home}/", "")
    assert [line.split(";")[0] for line in err.splitlines()] == [
        "error: there is no answer yet",
        "error: there is no /imag",
        "error: there is no image file no.png",
        "error: '' is no number",
        "error: a budget needs a pruner other than none, for example auto",
        "error: keep_ratio is 0.0",
        "error: no pruner is called 'nom'",
        "error: a.jpg is drawn as PNG, so name it .png",
        "error: the prompt has 2 <image> marks but there is 1 image",
        "error: there is no folder nowhere to write a.png into",
    ]
    assert "Visual tokens: 16 -> 5" in out and "Rows as in the turn before: " in out
    assert all(name in HELP and name in out for name in Session(chat, None).commands)
    assert (home / "kept.png").is_file()
    assert [turn.question for turn in chat.turns] == ["a ?"] and not chat.images


def test_ctrl_c_stops_an_answer_and_not_the_chat(home, loaded, capsys):
    model, processor = loaded
    calls = []

    def interrupt(tokens_L, logits_1V):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return logits_1V

    chat = Chat(model, processor, max_tokens=5, logits_processors=[interrupt])
    images = [Image.open(home / "a.png")]
    Session(chat, processor, images).run(["how many stars ?", "is it red ?"])
    first, second = chat.turns
    assert "(stopped)" in capsys.readouterr().out
    whole = scratch(model, processor, [first], "is it red ?", chat.images, {}, [])
    assert (second.answer, chat.result.token_ids) == (whole.text, whole.token_ids)


def test_ctrl_c_at_the_prompt_is_no_end_and_ctrl_d_is(monkeypatch, capsys):
    replies = iter([KeyboardInterrupt, "a ?", EOFError])

    def reply(prompt):
        answer = next(replies)
        if isinstance(answer, str):
            return answer
        raise answer

    monkeypatch.setattr("builtins.input", reply)
    assert list(typed_lines()) == ["a ?"]
    assert "/quit or Ctrl-D ends" in capsys.readouterr().out


def test_a_mistake_in_the_command_line_names_its_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--pruner", "norm", "--keep-ratio", "2"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: --keep-ratio is 2.0; ")


def test_the_pages_chat_answers_piped_lines(tmp_path):
    page = (ROOT / "docs" / "use.md").read_text(encoding="utf-8")
    (block,) = [b for b in re.findall(r"```sh\n(.*?)```", page, re.S) if "chat" in b]
    compose(1_000_000_007).image().save(tmp_path / "scene.png")
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        ["bash", "-c", block.replace("python -m", f"'{sys.executable}' -m")], cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "Visual tokens: 196 -> 49 (75.0% pruned)" in done.stdout


def test_the_command_reads_whatever_is_piped(tmp_path):
    compose(1_000_000_007).image().save(tmp_path / "a scene.png")
    (tmp_path / "lines").write_bytes(b"\xff\n/image a scene.png\nis there a red star ?\n/stats")
    code = (
        "import sys; sys.stdin = open('lines', encoding='utf-8');"
        "from mlx_vlm_prune.chat import main; main()"
    )
    done = start_python(tmp_path, "-c", code, "--max-tokens", "3")
    assert (done.returncode, done.stderr) == (0, "error: the prompt is not valid Unicode text\n")
    assert "Visual tokens: 196 -> 196" in done.stdout
