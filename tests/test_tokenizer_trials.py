"""Promises about tokenizers that may be slow: a text is tried in a process with limits, once."""

from pathlib import Path

import pytest

from mlx_vlm_prune.checkpoints import tokenizer_trial
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.inputs.prompt import Tokenizer

from .test_hostile_tokenizers import BACK, content, write

ENDS = {
    "time": ("import os, signal; os.kill(os.getpid(), signal.SIGXCPU)", "took more than 1 s"),
    "waiting": ("import time; time.sleep(60)", "took more than 1 s"),
    "killed": ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "took more than 4 GB"),
    "memory": ("import sys; sys.exit(4)", "took more than 4 GB"),
    "allocation": (
        "import os; os.write(2, b'memory allocation of 9 bytes failed'); os.abort()", "than 4 GB"
    ),
    "a fault": ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "ended in SIGSEGV"),
    "aborted": ("import os; os.abort()", "ended in SIGABRT"),
    "not tried": ("import no_such_module", "could not be tried: ModuleNotFoundError: No module"),
    "fails": ("import json, sys; print(json.dumps('ü')); sys.exit(3)", "does not work: ü"),
}  # fmt: skip


@pytest.mark.parametrize("end", ENDS)
def test_what_ended_a_trial_is_told(end, tmp_path, monkeypatch):
    program, sentence = ENDS[end]
    monkeypatch.setattr(tokenizer_trial, "PROGRAM", program)
    monkeypatch.setattr(tokenizer_trial, "SECONDS", 1)
    file = write(tmp_path, content()) / "tokenizer.json"
    with pytest.raises(UserError, match=sentence) as refused:
        tokenizer_trial.try_tokenizer(file, "it may be slow", ["a"])
    is_limit = end not in ("not tried", "fails")
    beginning = f"{file}: it may be slow, and encoding a text " if is_limit else f"{file} "
    assert str(refused.value).startswith(beginning) and "\n" not in str(refused.value)


def test_memory_is_limited_from_outside_where_the_system_limits_none(tmp_path, monkeypatch):
    """As on macOS."""
    program = "x = b'a' * (200 << 20); import time; time.sleep(60)"
    monkeypatch.setattr(tokenizer_trial, "PROGRAM", program)
    monkeypatch.setattr(tokenizer_trial, "BYTES", 100 << 20)
    monkeypatch.setattr(tokenizer_trial, "BOUNDS_MEMORY", False)
    file = write(tmp_path, content()) / "tokenizer.json"
    with pytest.raises(UserError, match="encoding a text took more than 0 GB"):
        tokenizer_trial.try_tokenizer(file, "it may be slow", ["a"])


def test_a_text_is_tried_once_and_the_beginning_of_texts_when_it_is_loaded(tmp_path, monkeypatch):
    split = {"type": "Split", "pattern": {"Regex": BACK}, "behavior": "Isolated", "invert": False}
    tried: list[list[str]] = []

    def note(file: Path, doubt: str, texts: list[str]) -> None:
        tried.append([*texts])

    monkeypatch.setattr(tokenizer_trial, "try_tokenizer", note)
    tokenizer = Tokenizer.from_folder(write(tmp_path / "w", content(pre_tokenizer=split)))
    for text in ("ab", "b", "ab"):
        assert tokenizer.missing_bos(text) == ""
        tokenizer.encode(text)
    assert tried == [["ab"], ["b"]]
    for n in range(tokenizer_trial.MOST_PASSED + 9):
        tokenizer.encode("a" * n)
    assert len(tokenizer.encoder.trial.passed) <= tokenizer_trial.MOST_PASSED
