"""Promises of the claims' page: the same figures by several ways of counting."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from benchmarks import claims, model_shapes, readme_tables, speculation
from mlx_vlm_prune.checkpoints.checkpoint import LEARNED_FILE
from mlx_vlm_prune.checkpoints.config import CLIPConfig, MiniMindConfig, VLMConfig
from mlx_vlm_prune.pruners import METHODS
from mlx_vlm_prune.scenes import CHECKPOINT


def test_a_claim_is_counted_with_everything_inside_and_as_its_authors_did():
    full = {"vision": 400, "projector": 2, "prefill": 148, "total": 550, "token": 10}
    pruned = {"vision": 200, "projector": 1, "prefill": 49, "total": 250, "token": 5}
    times = {kind: {part: {"median": float(ms)} for part, ms in parts.items()}
             for kind, parts in (("full", full), ("pruned", pruned))}  # fmt: skip
    gains = claims.gains(times)
    assert gains["tower_left_out"] == 550 / 50  # full with its tower, pruned without
    assert gains["answer"] == pytest.approx((550 + 63 * 10) / (250 + 63 * 5))


def test_a_gain_that_is_not_clear_is_not_reported():
    def row(**realised):
        gain = {part: {"realised": realised.get(part)} for part in ("total", "vision", "prefill")}
        return {"gain": gain, "gains": {"answer": 1.14, "tower_left_out": 4.2}}

    by_part = {claim.timed: claim for claim in claims.CLAIMS}
    assert claims.claimed_gain(by_part["answer"], row()) == "? (answer)"
    assert claims.claimed_gain(by_part["answer"], row(total=1.2)) == "1.14x (answer)"
    assert claims.claimed_gain(by_part["vision"], row(total=1.2)) == "? (vision)"
    assert claims.claimed_gain(by_part["vision"], row(vision=1.69)) == "1.69x (vision)"
    assert (
        claims.claimed_gain(by_part["tower_left_out"], row(total=1.3)) == "4.20x (tower left out)"
    )
    assert "benchmarks.speculation" in claims.claimed_gain(by_part[None], row(total=1.3))


def test_every_founding_system_has_its_claim_and_its_method_is_here():
    assert len({claim.system for claim in claims.CLAIMS}) == 5
    for claim in claims.CLAIMS:
        assert claim.pruner in METHODS and claim.shape in model_shapes.SHAPES
        assert claim.judged[0] == claim.pruner


def speculation_result(capsys, *flags: str) -> dict:
    """The result of a short run of the drafting benchmark, from its last line."""
    speculation.main(["--shape", "tiny", "--runs", "3", "--per-kind", "1", *flags])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize(("tokens", "drafts"), [(12, 5), (8, 3)])
def test_one_twig_is_always_right_and_one_never_and_all_say_the_same(
    monkeypatch, capsys, tokens, drafts
):
    config = VLMConfig(CLIPConfig(32, 48, 3, 2, 64, 16), MiniMindConfig(48, 64, 4, 4, 2, 128))
    monkeypatch.setitem(model_shapes.SHAPES, "tiny", config)
    result = speculation_result(capsys, "--tokens", str(tokens), "--drafts", str(drafts))
    cost, scenes = result["cost"], result["scenes"]
    turns = tokens // (drafts + 1)
    assert cost["drafts_right"]["right"] == [turns * drafts] * 2
    assert cost["drafts_right"]["wrong"] == [0, tokens * drafts]
    assert cost["same"] and scenes["same"] == scenes["questions"] == 6
    assert cost["ms"].keys() == {"full", "pruned", "right", "wrong"}
    for figures in (*cost["ms"].values(), *scenes["ms"].values()):
        assert 0 < figures["p10"] <= figures["median"] <= figures["p90"]
    assert 0 <= scenes["accepted"] <= scenes["drafted"] > 0


def test_a_twig_of_ones_own_is_measured_on_scenes_alone(tmp_path, capsys):
    """The shipped twig with the rows of its head shifted by one is never right."""
    folder = tmp_path / "twig"
    shutil.copytree(CHECKPOINT, folder)
    tensors = load_file(folder / LEARNED_FILE)
    tensors["twig.head.weight"] = np.roll(tensors["twig.head.weight"], 1, 0)
    save_file(tensors, folder / LEARNED_FILE)
    result = speculation_result(capsys, "--model", str(folder))
    assert "cost" not in result and result["model"] == str(folder)
    scenes = result["scenes"]
    assert scenes["accepted"] == 0 < scenes["drafted"]
    assert scenes["same"] == scenes["questions"] == 6
    with pytest.raises(SystemExit):
        speculation.main(["--model", str(folder), "--save"])
    assert "--save keeps the built-in model's figures" in capsys.readouterr().err


def test_the_table_says_both_ends_and_how_often_scenes_is_right():
    def result(wrong, right):
        gain = {"wrong": {"full": {"median": wrong}}, "right": {"full": {"median": right}}}
        return {"cost": {"gain": gain}, "scenes": {"drafted": 8, "accepted": 6}}

    tail = "(token; none to all of the drafts right, on scenes 75%)"
    assert speculation.summary(result(0.3, 2.1)) == f"0.30x to 2.10x {tail}"
    assert speculation.summary(result(None, 2.1)) == f"? to 2.10x {tail}"


def test_a_gain_of_drafting_is_reported_only_where_runs_agree():
    ms = {"full": [20.0, 20.0, 20.0], "pruned": [10.0, 10.0, 30.0], "right": [10.0, 10.0, 10.0]}
    gain = speculation.gains(ms, ["right"])["right"]
    assert gain["full"]["median"] == 2.0
    assert gain["pruned"]["median"] is None and gain["pruned"]["p90"] == 3.0


def test_without_the_measurement_the_table_says_so(tmp_path):
    assert readme_tables._drafting_gain(tmp_path) == "not measured yet"
