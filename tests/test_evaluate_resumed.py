"""Resumable commands: one process at a time, no answer lost, none counted twice."""

import json
import signal
import subprocess
import sys

import pytest

from mlx_vlm_prune.checkpoints.reading.locks import locked, writing_alone
from mlx_vlm_prune.evaluate import main
from mlx_vlm_prune.evaluation.answers import EvaluatedVLM
from mlx_vlm_prune.evaluation.evaluation_run import EvaluationRun
from torch_ref.training.scenes import train as train_scenes

from . import test_evaluate, test_sweep
from .test_evaluate import COUNT, command, interrupt, refused, run, without_times

_cache, home = test_evaluate._cache, test_evaluate.home  # fixtures
K = ("--keep-tokens", "12")
HELD = """
import sys, time
from pathlib import Path
from mlx_vlm_prune.checkpoints.reading.locks import writing_alone
with writing_alone(Path(sys.argv[1]), "evaluating", "--out"):
    print("held", flush=True)
    time.sleep(60)
"""


def interrupted(home, out, monkeypatch, at: int) -> list[str]:
    """The lines that a run leaves that is interrupted at a question."""
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        interrupt(patched, at)
        main(command(home, out, *K))
    (part,) = out.parent.glob(f"{out.stem}.*.part.jsonl")
    return part.read_text().splitlines(keepends=True)


def test_a_second_run_into_the_same_file_is_refused_and_a_killed_one_blocks_nobody(
    home, tmp_path, capsys
):
    out = tmp_path / "e.json"
    with subprocess.Popen(
        [sys.executable, "-c", HELD, str(out)], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        line = refused(capsys, command(home, out, *K))
        sentence = f"another process is evaluating into {out}; wait for it, or name another file"
        assert sentence in line and "--out" in line
        assert not [*tmp_path.glob("*.jsonl")] and not out.exists()
        run(home, tmp_path / "other.json", *K)
        other.send_signal(signal.SIGKILL)
    assert (tmp_path / ".e.json.lock").exists()
    run(home, out, *K)
    assert not (tmp_path / ".e.json.lock").exists()


def test_a_run_that_ends_leaves_the_file_of_the_next_one_alone(tmp_path):
    """The lock is on the file that has the name now, not on one that was removed."""
    path = tmp_path / "x.lock"
    with locked(path, "no"):
        path.unlink()
        with locked(path, "no"):
            pass
    with locked(path, "no"):
        assert path.exists()


def test_two_sweeps_and_two_trainings_into_one_place_are_refused(tmp_path, capsys):
    out = tmp_path / "r.json"
    argv = ["--json", str(out), "--runs", "1"]
    with writing_alone(out, "sweeping", "--json"):
        line = test_sweep.refused(capsys, argv)
    assert f"another process is sweeping into {out}; wait for it" in line and "--json" in line
    with (
        locked(tmp_path / "run.lock", ""),
        pytest.raises(ValueError, match="another process is training in"),
    ):
        train_scenes(tmp_path, None, 0, 0)


def without_first(lines):
    return lines[1:]


def twice(lines):
    return [*lines, *lines]


def of_a_later_batch_first(lines):
    return [*lines[6:], *lines[:6]]


def with_a_gap(lines):
    return [*lines[:3], *lines[4:]]


def with_anothers_end(lines):
    """The lines of a second process, which began when the first had one batch."""
    return [*lines[:6], *lines[6:9], *lines[6:]]


def of_other_questions(lines):
    return [*lines[:6], *[line.replace('"numbers": [4', '"numbers": [1') for line in lines[6:]]]


def with_an_answer_less(lines):
    line = json.loads(lines[7])
    return [*lines[:7], json.dumps(line | {"ids": line["ids"][:-1]}) + "\n", *lines[8:]]


@pytest.mark.parametrize(
    "damage",
    [without_first, twice, of_a_later_batch_first, with_a_gap, with_anothers_end,
     of_other_questions, with_an_answer_less],
)  # fmt: skip
def test_a_line_that_does_not_go_on_from_the_one_before_is_dropped_with_those_after_it(
    home, tmp_path, monkeypatch, damage
):
    straight = run(home, tmp_path / "straight.json", *K)
    lines = interrupted(home, tmp_path / "e.json", monkeypatch, 10)
    assert len(lines) == 12  # two batches, six methods
    (part,) = tmp_path.glob("e.*.part.jsonl")
    part.write_text("".join(damage(lines)))
    assert without_times(run(home, tmp_path / "e.json", *K)) == without_times(straight)


def test_questions_that_are_counted_twice_are_a_sentence(home, tmp_path, monkeypatch, capsys):
    lines = interrupted(home, tmp_path / "e.json", monkeypatch, 10)
    (part,) = tmp_path.glob("e.*.part.jsonl")
    part.write_text("".join(twice(lines)))

    def take_over(self, line):
        self._record(line)
        return True

    monkeypatch.setattr(EvaluationRun, "_take_over", take_over)
    line = refused(capsys, command(home, tmp_path / "e.json", *K))
    assert f"19 answers were kept to {COUNT} questions; remove the .part.jsonl file" in line
    assert not (tmp_path / "e.json").exists()


@pytest.mark.parametrize("at", [2, 6, 8, 18])
def test_an_interrupt_between_two_methods_loses_no_answer(home, tmp_path, monkeypatch, capsys, at):
    straight = run(home, tmp_path / "straight.json", *K)
    calls, answer = [], EvaluatedVLM.answer

    def counted(self, *arguments):
        calls.append(arguments)
        if len(calls) == at:
            raise KeyboardInterrupt
        return answer(self, *arguments)

    monkeypatch.setattr(EvaluatedVLM, "answer", counted)
    with pytest.raises(SystemExit) as stop:
        main(command(home, tmp_path / "e.json", *K))
    answers = sum(min(4, COUNT - 4 * (n // 6)) for n in range(at - 1))
    message = f"interrupted after {answers} of {COUNT * 6} answers; the same command goes on"
    assert stop.value.code == 130 and message in capsys.readouterr().err
    assert without_times(run(home, tmp_path / "e.json", *K)) == without_times(straight)
    assert len(calls) == 3 * 6 + 1, "nothing is asked again"


def test_rounds_of_a_sweep_that_do_not_go_on_are_dropped(tmp_path, monkeypatch, capsys):
    home = tmp_path
    test_sweep.tiny.checkpoint(test_sweep.tiny.reference(), home)
    (home / "photos").mkdir()
    test_sweep.write_picture(home / "photos" / "0.png", 0)
    out, more = tmp_path / "r.json", ("--pruner", "norm", "--keep-tokens", "5", "--runs", "4")
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        test_sweep.calls_of(patched, interrupt_at=8)  # after a warm-up and two rounds
        test_sweep.run(home, out, *more)
    (part,) = tmp_path.glob("r.*.part.jsonl")
    lines = part.read_text().splitlines(keepends=True)
    part.write_text("".join([*lines, *lines]))  # as two sweeps at once would
    result = test_sweep.run(home, out, *more)
    assert f"going on: {len(lines)} of 4 rounds" in capsys.readouterr().err
    assert result["rows"][1]["runs"] == 4
