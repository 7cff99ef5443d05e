"""Promises of the benchmark beside stock mlx-vlm: the same answer on both sides, JSON last."""

import json

import pytest

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")

from benchmarks import command_line, hosts

TINY = ["--size", "tiny", "--runs", "2", "--warmup", "1"]


@pytest.mark.parametrize("family", hosts.FAMILIES)
def test_both_sides_say_the_same_first_token_and_fewer_tokens_are_read(family):
    model, inputs = hosts.FAMILIES[family](hosts.SIZES["tiny"])
    _, expected = hosts.run_stock(model, inputs)
    ms, token = hosts.run_ours(model, inputs, "none", 1.0)
    assert token == expected
    assert {"vision", "prefill", "total"} <= ms.keys()
    ms, token = hosts.run_ours(model, inputs, "none", 1.0, in_parts=False)
    assert token == expected and ms.keys() == {"total"}


def test_the_prediction_is_that_of_a_count_by_hand():
    """Two layers of 64, heads of 32, one for keys; 94 rows, or 46 with a quarter of 64 tokens."""

    def prefill_count(L):
        linear = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 192
        return 2 * (L * linear + 2 * L * L * 64) + 64 * hosts.VOCAB

    gain = hosts.predicted_gain(hosts.SIZES["tiny"], 0.25)
    assert gain == pytest.approx(prefill_count(94) / prefill_count(46))


def test_another_first_token_is_refused_and_nothing_is_printed(monkeypatch, capsys):
    run_stock = hosts.run_stock
    monkeypatch.setattr(hosts, "run_stock", lambda *inputs: (run_stock(*inputs)[0], -1))
    with pytest.raises(SystemExit) as stop:
        hosts.main([*TINY, "--family", "llava"])
    printed = capsys.readouterr()
    assert stop.value.code == 2 and printed.out == ""
    assert "llava, tiny: unpruned, our path says another first token" in printed.err


def test_the_last_line_is_json_and_it_is_saved(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(command_line, "RESULTS", tmp_path)
    hosts.main([*TINY, "--save", "hosts"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads((tmp_path / "hosts.json").read_text(encoding="utf-8")) == result
    assert [row["family"] for row in result["rows"]] == list(hosts.FAMILIES)
    for row in result["rows"]:
        assert row["ms"].keys() == {"stock", "full", "parts", "pruned"}
        assert row["stock_by_ours"]["p10"] <= row["stock_by_ours"]["p90"]


@pytest.mark.parametrize("argv", [["--keep-ratio", "0"], ["--size", "huge"], ["--runs", "0"]])
def test_a_mistake_ends_in_one_sentence(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        hosts.main(argv)
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1
