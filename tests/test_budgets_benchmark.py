"""The benchmark of budgets runs for our models and mlx-vlm's; no measured time is asserted."""

import pytest

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")

from benchmarks.budgets import HOSTS, OURS, STEPS, parse, run
from mlx_vlm_prune.checkpoints.errors import UserError

from . import calibrations


@pytest.mark.parametrize("shape", ["scenes", "llava-tiny", "qwen2_5_vl-tiny"])
def test_a_wish_is_put_to_a_model_and_answered(shape, tmp_path, monkeypatch, capsys):
    calibrations.isolate(monkeypatch, tmp_path / "cache")
    monkeypatch.setenv("MLX_VLM_PRUNE_CALIBRATION_SECONDS", "0.1")
    args = parse(["--shape", shape, "--prompts", "2", "--pruner", "norm"])
    try:
        result = run(args)
    except UserError as problem:  # a tiny model's times may be the machine's noise alone
        assert shape != "scenes" and "hardly depend on them" in str(problem)
        pytest.skip(str(problem))
    (row,) = result["rows"]
    assert row["of"] == 2 and 0 <= row["met"] <= 2
    for trial in row["trials"]:
        assert 1 <= trial["tokens"] < trial["of"] <= result["N"]
        assert {*trial["more_ms"]} <= {*STEPS}
        assert trial["wish_ms"] > 0 and trial["took_ms"] > 0 and trial["took_gb"] > 0
    assert [*row["within_with_more"]] == [
        share for share in STEPS if any(share in trial["more_ms"] for trial in row["trials"])
    ]
    assert "Within the wish" in capsys.readouterr().out


def test_every_shape_can_be_named():
    assert {*OURS, *HOSTS} >= {"scenes", "minimind2-v-small", "llava-mid", "qwen2_5_vl-mid"}
    assert parse(["--shape", "llava-mid"]).pruner == ["divprune", "received_attention"]
    assert parse([]).pruner == ["divprune", "tome"]
