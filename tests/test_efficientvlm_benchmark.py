"""EfficientVLM's table by one command: both stages, the same start, kept runs, and the page."""

import json

import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

from benchmarks import command_line, efficientvlm
from benchmarks.readme_tables import efficientvlm_table
from mlx_vlm_prune.checkpoints.reading.files import open_safetensors

SMALL = ["--steps", "1", "--per-kind", "1", "--runs", "1"]


def test_cases_train_from_one_start_and_a_second_run_keeps_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command_line, "RESULTS", tmp_path)
    monkeypatch.setattr(efficientvlm, "CASES", (("none", 196), (efficientvlm.POOL, 49)))
    for settings in efficientvlm.STAGES.values():
        monkeypatch.setitem(settings, "batch_size", 2)
        monkeypatch.setitem(settings, "val_batches", 1)
    assert efficientvlm_table(tmp_path) == "Not measured yet."
    folder = tmp_path / "runs"
    efficientvlm.main([*SMALL, "--folder", str(folder), "--save"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [case["tokens"] for case in result["cases"]] == [196, 49]
    table = efficientvlm_table(tmp_path).splitlines()
    assert len(table) == 4 and "| `none` | 196 |" in table[2] and "| 49 |" in table[3]
    start = open_safetensors(folder / "start" / "model.safetensors")
    for name in ("none-196", "attention_pool-49"):
        stages = [
            open_safetensors(folder / f"{name}-{s}" / "model.safetensors")
            for s in ("pretrain", "sft")
        ]
        first = [t["language.layers.0.mlp.up_proj.weight"].data for t in (start, *stages)]
        assert bytes(first[0]) == bytes(first[1]) != bytes(first[2])  # frozen, then trained
        assert not any(name.startswith("projector") and bytes(t.data) == bytes(start[name].data)
                       for name, t in stages[0].items())  # fmt: skip

    def train(config):
        raise AssertionError("a run that is kept trains again")

    monkeypatch.setattr(efficientvlm, "train", train)
    efficientvlm.main([*SMALL, "--folder", str(folder), "--timings-only"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["cases"] == result["cases"]
    with pytest.raises(SystemExit) as end:
        efficientvlm.main(["--folder", str(tmp_path / "none"), "--timings-only"])
    assert end.value.code == 2 and "run without --timings-only first" in capsys.readouterr().err
