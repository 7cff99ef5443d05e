"""Promises of what is printed: any character on any output, a line of its own after Ctrl-C, and a
short line for a result."""

import io
import sys

import pytest

from mlx_vlm_prune import generate, load
from mlx_vlm_prune.checkpoints.command_line import in_one_sentence
from mlx_vlm_prune.generate import main
from mlx_vlm_prune.generation.printing import print_piece
from mlx_vlm_prune.inputs.prompt import Tokenizer
from mlx_vlm_prune.scenes import compose

from .entry_points import start_python

QUESTION = "Is there a red star?"
ANSWER = {"ascii": "\\u732b caf\\xe9", "latin-1": "\\u732b café", "utf-8": "猫 café"}


@pytest.fixture(scope="module")
def scenes():
    return load(dtype="float32")


@pytest.mark.parametrize("encoding", ANSWER)
@pytest.mark.parametrize("is_command", [True, False])
def test_an_answer_is_printed_on_any_output(scenes, monkeypatch, encoding, is_command):
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids: "猫 café" if len(ids) else "")
    output = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", output)
    if is_command:
        main(["--prompt", QUESTION, "--max-tokens", "1", "--no-verbose"])
    else:
        generate(*scenes, QUESTION, max_tokens=1, verbose=True)
        assert output.errors == "strict"  # the caller's own
    output.flush()
    assert output.buffer.getvalue().decode(encoding).splitlines() == [ANSWER[encoding]]


@pytest.mark.parametrize("encoding", ["ascii", "latin1"])
def test_help_is_printed_on_any_output(tmp_path, monkeypatch, encoding):
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    done = start_python(tmp_path, "-m", "mlx_vlm_prune.generate", "--help")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_prompt_from_stdin_that_is_no_text_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9 ?"), encoding="utf-8"))
    with pytest.raises(SystemExit) as stop:
        main(["--prompt", "-"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: the prompt is not valid Unicode text\n"


def test_ctrl_c_in_an_answer_leaves_a_fresh_line_on_a_terminal(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", terminal)
    with pytest.raises(SystemExit) as stop, in_one_sentence():
        print_piece("an ans")
        raise KeyboardInterrupt
    assert (stop.value.code, terminal.getvalue()) == (130, "an ans\n")


def test_nothing_is_written_after_ctrl_c_where_there_is_no_terminal(capsys):
    with pytest.raises(SystemExit) as stop, in_one_sentence():
        raise KeyboardInterrupt
    assert stop.value.code == 130 and capsys.readouterr() == ("", "")


def test_a_result_is_a_short_line(scenes):
    image = compose(seed=1_000_000_007).image()
    answer = generate(*scenes, QUESTION, image, pruner="norm", keep_tokens=9, max_tokens=2)
    line = repr(answer)
    assert str(answer) == line and "\n" not in line and len(line) < 250
    assert line.startswith(f"GenerationResult(text={answer.text!r}, generation_tokens=2, ")
    assert "visual_tokens=196, visual_tokens_kept=9, pruner='norm'" in line
