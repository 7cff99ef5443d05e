"""Promises of the benchmark of serving: it says its goals, and ends in JSON."""

import json

import pytest

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")
pytest.importorskip("fastapi", reason="the server needs FastAPI")

from benchmarks import command_line, serving_speed

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
    for figures in (row["serve_by_generate"], row["gain"], *row["requests_per_s"].values()):
        assert 0 < figures["p10"] <= figures["p90"]
    assert "the goal is 1.03 at most" in printed[0]


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
