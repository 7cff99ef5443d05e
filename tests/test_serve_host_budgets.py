"""`budget_ms` of a served request to a model of mlx-vlm's. No measured time is asserted."""

import pytest

pytest.importorskip("fastapi", reason="fastapi is not installed")
pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")

from mlx_vlm_prune import load

from . import calibrations
from .host_folders import desk
from .serving import noise, question, serve
from .test_host_budgets import slow_machine

PICTURE = noise(90, 80)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    place = desk(tmp_path_factory.mktemp("hosts"), ["llava", "qwen2_5_vl"])
    models = {kind: load(place / kind) for kind in ("llava", "qwen2_5_vl")}
    return models.__getitem__


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    return calibrations.isolate(monkeypatch, tmp_path / "cache")


NORM = {"method": "norm", "is_pruning": True, "budget_ms": 1e9}


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl"])
def test_milliseconds_choose_k_and_what_cannot_be_is_a_warning(kind, loaded, monkeypatch):
    """A row takes a second: 4 tokens beside the words."""
    from mlx_vlm_prune.serving import time_budget

    calls = []

    def measure(prompt):
        calls.append(prompt)
        return slow_machine(prompt.pipeline.spec)

    monkeypatch.setattr(time_budget, "measure", measure)
    monkeypatch.setattr(time_budget, "measure_level", lambda *_: 1.0)
    message = question("w7 w9", PICTURE)
    with serve(*loaded(kind), **NORM) as server:
        usage = server.chat(message, max_tokens=1)["usage"]
        assert usage["visual_tokens_kept"] == usage["visual_tokens"] > 4
        words = usage["prompt_tokens"] - usage["visual_tokens"]
        ms = 1000.0 * (words + 4) + 900
        usage = server.chat(message, budget_ms=ms, max_tokens=1)["usage"]
        assert (usage["visual_tokens_kept"], usage["prompt_tokens"]) == (4, words + 4)
        late = server.chat(message, budget_ms=1.0, max_tokens=1)
        assert late["usage"]["visual_tokens_kept"] == late["usage"]["visual_tokens"]
        (warning,) = late["warnings"]
        assert "pruning with norm cannot meet 1 ms" in warning and len(calls) == 1
        assert "cannot meet 1 ms" in server.refusal(message, budget_ms=1.0, strict=True)[1]
        (warning,) = server.chat(message, budget_ms=9.0, pruner="avgpool", max_tokens=1)["warnings"]
        assert "budget_ms is possible with norm alone" in warning


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl"])
def test_a_server_that_was_calibrated_answers_as_one_that_was_not(kind, loaded):
    message, answers = question("w7 w9", PICTURE), []
    for settings in ({}, NORM):
        with serve(*loaded(kind), **settings) as server:
            half = {"keep_ratio": 0.5, "pruner": "norm", "max_tokens": 6}
            answers.append(server.chat(message, **half)["choices"])
    assert answers[0] == answers[1]
