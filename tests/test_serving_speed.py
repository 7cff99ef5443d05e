"""Promises of the benchmark of serving: it says its goals, and ends in JSON."""

import json

import pytest

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")
pytest.importorskip("fastapi", reason="the server needs FastAPI")

from benchmarks import command_line, serving_speed
from benchmarks.serving_table import load_rows, serving_rows

TINY = ["--size", "tiny", "--clients", "2", "--max-tokens", "3", "--runs", "2", "--warmup", "0"]


@pytest.mark.parametrize("family", serving_speed.FAMILIES)
def test_both_answer_the_same_and_the_last_line_is_json(family, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(command_line, "RESULTS", tmp_path)
    serving_speed.main([*TINY, "--family", family, "--save"])
    printed = capsys.readouterr().out.splitlines()
    result = json.loads(printed[-1])
    assert json.loads((tmp_path / "serving_speed.json").read_text(encoding="utf-8")) == result
    (row,) = result["rows"]
    assert (row["family"], row["tokens"], row["runs"]) == (family, 64, 2)
    gains, rates = row["gains"], row["requests_per_s"]
    assert tuple(gains) == serving_speed.METHODS[family] and [*rates] == ["full", *gains]
    for figures in (row["serve_by_generate"], *gains.values(), *rates.values()):
        assert 0 < figures["p10"] <= figures["p90"]
    assert "the goal is 1.03 at most" in printed[1]
    _, _, *lines = serving_rows(result).splitlines()
    assert [line.split(" | ")[5] for line in lines] == [f"`{pruner}`" for pruner in gains]
    assert [line.count("the goal is 1.5 at least") for line in printed[3:-1]] == [1] * len(gains)


def test_what_was_lost_or_wrong_under_load_is_counted_in_the_table():
    result = {
        "requests": 7, "clients": 2, "seconds": 3.4,
        "ends": {"same as alone": 3, "refused": 1, "another answer": 1, "lost: 500": 2},
        "memory_mb": {"before": 10.4, "half_way": 20, "at_most": 30, "end": 25},
    }  # fmt: skip
    heads, _, line = load_rows(result).splitlines()
    assert line == "| 7 | 2 | 3 | 3 | 1 | 0 | 3 | 10 | 20 | 30 | 25 |"
    assert len(heads.split("|")) == len(line.split("|"))


def test_an_answer_that_is_not_generates_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(serving_speed.Rivals, "generate_one", lambda *_: (1.0, "other words"))
    with pytest.raises(SystemExit) as stop:
        serving_speed.main([*TINY, "--family", "llava"])
    printed = capsys.readouterr()
    assert stop.value.code == 2 and printed.out == ""
    assert "llava: the server's answer is another than generate's" in printed.err


@pytest.mark.parametrize("argv", [["--keep-ratio", "0"], ["--minutes", "0"], ["--clients", "0"]])
def test_a_mistake_ends_in_one_sentence(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        serving_speed.main(argv)
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and argv[0] in error
