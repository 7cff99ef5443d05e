"""Published questions put to each kind of model of ours: the built-in one, MiniMind-V's and LLaVA.

mlx-vlm's models are in test_hosts_evaluate.py.
"""

import json
from pathlib import Path

import pytest

from mlx_vlm_prune.evaluate import main

from . import generations, llava
from .test_evaluate_published import answers, mm_vet, pope
from .test_generations import converted

KINDS = ("scenes", "minimind2-v", "llava")


@pytest.fixture(scope="module", params=KINDS)
def model(request, tmp_path_factory) -> list[str]:
    """The options that name a model; none for the built-in one."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "scenes":
        return []
    if request.param == "llava":
        llava.write(llava.random_model(), folder)
        return ["--model", str(llava.llama_words(folder))]
    return ["--model", str(converted(generations.release("minimind2-v", False), folder))]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_VLM_PRUNE_CACHE", str(tmp_path / "cache"))


def run(model, out: Path, *options: str) -> dict:
    argv = [*model, *options, "--out", str(out), "--pruner", "norm", "--keep-ratio", "0.5"]
    main([*argv, "--max-tokens", "3"])
    return json.loads(out.read_text(encoding="utf-8"))


def test_every_kind_of_model_answers_scored_and_unscored_sets(model, tmp_path):
    pope_file, vet = pope(tmp_path / "pope"), mm_vet(tmp_path / "vet")
    scored = run(model, tmp_path / "a.json", "--questions", str(pope_file), "--format", "pope",
                 "--answers", str(tmp_path / "written"))  # fmt: skip
    assert [row["pruner"] for row in scored["rows"]] == ["none", "random", "norm"]
    assert all(0 <= row["overall"] <= 1 and "F1" in row["more"] for row in scored["rows"])
    unscored = run(model, tmp_path / "b.json", "--questions", str(vet), "--format", "mmvet")
    assert all("overall" not in row and row["logprob"] < 0 for row in unscored["rows"])
    for result in (scored, unscored):
        folder = Path(result["answers"])
        for file in folder.glob("*.jsonl"):
            assert len(answers(folder, file.stem)) == result["count"]
        assert len(list(folder.glob("*.jsonl"))) == 3
