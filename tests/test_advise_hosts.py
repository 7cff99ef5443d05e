"""The advice for a model of mlx-vlm's: its figures are those of its answers."""

import json

import pytest

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")

from mlx_vlm_prune import generate, load
from mlx_vlm_prune.advise import advise, load_evaluation, main
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.planning.times import PROMPT

from . import calibrations
from .host_folders import desk
from .test_advise import ROWS

KINDS = ["llava", "qwen2_5_vl", "smolvlm"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return desk(tmp_path_factory.mktemp("hosts"), KINDS)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    return calibrations.isolate(monkeypatch, tmp_path / "cache")


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_and_the_bytes_of_the_cache_are_those_of_generate(place, kind):
    model, processor = load(place / kind)
    picture = place / "a.png"
    measured = advise(model, processor, picture, {}, "my-model")
    full = generate(model, processor, PROMPT, picture, max_tokens=1)
    kept = generate(model, processor, PROMPT, picture, pruner="random", max_tokens=1,
                    keep_tokens=measured.kept)  # fmt: skip
    assert (measured.tokens, measured.kept) == (full.visual_tokens, kept.visual_tokens_kept)
    assert measured.kept == max(1, full.visual_tokens // 4, len(full.views))
    assert measured.cache_bytes == (full.cache_bytes, kept.cache_bytes)
    assert "inside" not in measured.times.first
    assert ("smaller" in measured.times.first) == (kind == "qwen2_5_vl")
    (line,) = [line for line in measured.lines if line.startswith("Inside the tower")]
    assert ("--resize-shape" in line) == (kind == "qwen2_5_vl")
    assert "methods work too (tome" in line  # as `generate --pruner tome` does in all three
    assert min(measured.times.first.values()) > 0 and measured.times.token > 0


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl"])
def test_the_command_prints_ten_lines_and_writes_every_figure(place, kind, tmp_path, capsys):
    file, rows = tmp_path / "advice.json", [row | {"keep_ratio": 0.25} for row in ROWS]
    (tmp_path / "e.json").write_text(json.dumps({"questions": "mine", "rows": rows, "count": 2004}))
    main(["--model", str(place / kind), "--evaluation", str(tmp_path / "e.json"),
          "--json", str(file)])  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 10 and lines[-1].startswith("Advice: ")
    assert str(place / kind) in lines[0]
    (line,) = [line for line in lines if line.startswith("Inside the tower")]
    assert ("--resize-shape" in line) == (kind == "qwen2_5_vl")
    assert json.loads(file.read_text())["times"]["first"].keys() >= {"behind"}


def test_a_model_without_a_name_is_called_by_its_folder(place):
    model, processor = load(place / "llava")
    assert advise(model, processor, place / "a.png", {}).model == str(place / "llava")


def test_a_share_that_is_a_text_is_no_evaluation(tmp_path):
    file = tmp_path / "e.json"
    file.write_text(json.dumps({"rows": [ROWS[0] | {"keep_ratio": "0.25"}]}))
    with pytest.raises(UserError, match="is no evaluation"):
        load_evaluation(None, file)


def test_a_budget_that_was_evaluated_as_a_share_is_recommended_as_one():
    from dataclasses import replace

    from .test_advise import advice

    shared = replace(advice(ROWS), frontier=[row | {"keep_ratio": 0.25} for row in ROWS[5:6]])
    assert shared.recommendation.endswith("--pruner divprune --keep-ratio 0.25")
