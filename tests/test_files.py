"""Promises about files: what we write is whole or not there, and what we read is JSON or named."""

import errno
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from benchmarks import command_line
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.checkpoints.reading.files import atomic_path, read_json, write_atomically

from .test_hostile_checkpoints import file_names

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def file(tmp_path) -> Path:
    """One that is there already, alone in its folder; its name is a pattern, too."""
    (tmp_path / "alone").mkdir()
    there = tmp_path / "alone" / "a[1]*.json"
    there.write_text("old")
    return there


def is_as_before(file: Path) -> bool:
    return file.read_text() == "old" and file_names(file.parent) == {file.name}


# --- reading --------------------------------------------------------------------------

FAULTS = {
    "is not valid JSON": b"",
    "is not valid JSON (Expecting": b'{"a": 1',
    "is not valid JSON ('utf-8' codec": b'{"a": "\xff"}',
    "is not valid JSON (Unexpected UTF-8 BOM": b"\xef\xbb\xbf{}",
    "is nested too deeply": b"[" * 100_000,
    "must hold a JSON object": b"[1]",
}


@pytest.mark.parametrize("sentence", FAULTS)
def test_what_is_no_json_object_is_refused_by_the_files_name_and_a_reason(file, sentence):
    file.write_bytes(FAULTS[sentence])
    with pytest.raises(UserError) as refusal:
        read_json(file)
    assert str(refusal.value).startswith(f"{file} {sentence}") and "\n" not in str(refusal.value)


def test_a_file_that_is_not_there_and_a_list_where_one_is_wanted(file, tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*gone: there is no such file"):
        read_json(tmp_path / "gone")
    file.write_bytes(b"\xef\xbb\xbf[1]")
    assert read_json(file, list, "utf-8-sig") == [1]
    file.write_text("{}")
    with pytest.raises(UserError, match="must hold a JSON list"):
        read_json(file, list)


# --- writing --------------------------------------------------------------------------


def test_a_text_takes_the_place_of_the_old_one_and_nothing_else_is_left(file):
    write_atomically(file, "new")
    assert file.read_text() == "new" and file_names(file.parent) == {file.name}
    write_atomically(file.with_name("other"), "first")
    assert file_names(file.parent) == {file.name, "other"}


def test_whoever_reads_meanwhile_sees_the_old_or_the_new_and_never_half(file):
    texts = ["a" * 100_000, "b" * 100_000]
    write_atomically(file, texts[0])
    read, ends = set(), threading.Event()

    def reader() -> None:
        while not ends.is_set():
            read.add(file.read_text())

    thread = threading.Thread(target=reader)
    thread.start()
    for i in range(50):
        write_atomically(file, texts[i % 2])
    ends.set()
    thread.join()
    assert read and read <= set(texts)


def test_the_bytes_are_on_the_disk_before_the_name_is(file, monkeypatch):
    """Or a power failure could leave the new name with nothing in it."""
    order, sync, replace = [], os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda n: (order.append("bytes"), sync(n)))
    monkeypatch.setattr(Path, "replace", lambda *a: (order.append("name"), replace(*a)))
    write_atomically(file, "new")
    assert order == ["bytes", "name", "bytes"]  # the folder's own come last


@pytest.mark.parametrize("problem", [KeyboardInterrupt, RuntimeError, UserError])
def test_whatever_interrupts_a_write_leaves_the_old_file(file, problem):
    with pytest.raises(problem), atomic_path(file, replace=True) as beside:
        beside.write_text("half")
        raise problem
    assert is_as_before(file)


WRITERS = {
    "a text": "write_atomically(file, 'x' * 100_000)",
    "a benchmark's result": (
        "import argparse; from benchmarks import command_line as c; c.RESULTS = file.parent; "
        "save = argparse.Namespace(save=file.stem); "
        "c.run_command(lambda _: save, lambda _: {'x': 'x' * 99_000})"
    ),
    "a checkpoint of the trainer's": (
        "import torch; from torch_ref.training.scenes import save; "
        "save(file, {'a': torch.zeros(99_999)})"
    ),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_disk_that_fills_up_is_told_in_a_sentence_and_leaves_the_old_file(file, writer):
    """A real refusal by the kernel in the middle of a write."""
    limited = (
        "import resource, signal, sys, pathlib\n"
        "from mlx_vlm_prune.checkpoints.command_line import in_one_sentence\n"
        "from mlx_vlm_prune.checkpoints.reading.files import write_atomically\n"
        f"file = pathlib.Path({str(file)!r})\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        f"with in_one_sentence():\n    {WRITERS[writer]}\n"
    )
    ran = subprocess.run([sys.executable, "-c", limited], cwd=ROOT, capture_output=True, text=True)
    sentence = f"error: cannot write {file}: File too large; what was there stays\n"
    assert (ran.returncode, ran.stderr) == (2, sentence)
    assert is_as_before(file)


def test_a_read_only_folder_is_told_in_a_sentence(tmp_path):
    folder = tmp_path / "read-only"
    folder.mkdir(mode=0o555)
    if os.geteuid() == 0:  # who may write anywhere, but for here
        folder = Path("/sys")
    if not folder.is_dir():
        pytest.skip("no folder here that root cannot write to")
    with pytest.raises(UserError, match=f"cannot write {folder / 'a'}: .*; nothing was left"):
        write_atomically(folder / "a", "new")
    assert not (folder / "a").exists()


def test_a_device_and_a_folder_are_never_replaced(file):
    with pytest.raises(UserError, match="is no regular file"):
        write_atomically(Path(os.devnull), "new")
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    with pytest.raises(UserError, match="is a folder; name a file in it"):
        write_atomically(file.parent, "new")
    with pytest.raises(UserError, match=r"there is no folder .*gone to write a into"):
        write_atomically(file.parent / "gone" / "a", "new")
    assert is_as_before(file)


def test_a_benchmark_that_cannot_keep_its_result_says_so(file, capsys, monkeypatch):
    import argparse

    def full(self, *args, **options):
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", full)
    monkeypatch.setattr(command_line, "RESULTS", file.parent)
    with pytest.raises(SystemExit) as stop:
        command_line.run_command(lambda _: argparse.Namespace(save=file.stem), lambda _: {})
    assert stop.value.code == 2 and "No space left on device" in capsys.readouterr().err
    assert is_as_before(file)


def test_what_a_killed_write_left_is_swept_by_the_next(file):
    killed = (
        "import os, pathlib, signal\n"
        "from mlx_vlm_prune.checkpoints.reading.files import atomic_path\n"
        f"with atomic_path(pathlib.Path({str(file)!r}), replace=True) as beside:\n"
        "    beside.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ran = subprocess.run([sys.executable, "-c", killed], cwd=ROOT)
    assert ran.returncode == -signal.SIGKILL
    assert file.read_text() == "old" and len(file_names(file.parent)) == 2
    write_atomically(file, "new")
    assert file.read_text() == "new" and file_names(file.parent) == {file.name}
