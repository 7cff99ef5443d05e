"""Promises of docs/evaluation.md: mlx-vlm's own benchmarks prune inside a block, on made data."""

import csv
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlx_vlm.evals.utils", reason="mlx-vlm is not installed")
pytest.importorskip("datasets", reason="datasets is not installed")

import datasets

from mlx_vlm_prune import generate, load
from mlx_vlm_prune.scenes import compose

from . import host_folders
from .entry_points import ROOT

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own
PAGE = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")
(RECIPE,) = re.findall(r"```py\n(import sys\n.*?)```", PAGE, re.S)
QUESTION = "w7 w9"
# What each benchmark reads of an example, beside the question and the picture.
ROWS: dict[str, dict[str, Any]] = {
    "mmstar": {"answer": "A", "category": "math", "l2_category": "geometry", "meta_info": "-"},
    "mmmu": {"answer": "A", "options": "", "id": "1"},
    "math_vista": {
        "pid": "1", "query": QUESTION, "question_type": "free_form", "answer_type": "text",
        "choices": [""], "unit": "", "precision": 0.0, "answer": "w9",
        "metadata": {"category": "-"},
    },
    "ocrbench": {"dataset": "made", "type": "words", "answer": ["w9"]},
}  # fmt: skip
SPLITS = {"mmstar": "val", "mmmu": "validation", "math_vista": "testmini", "ocrbench": "test"}


def write_questions(folder: Path, name: str, count: int = 2) -> None:
    """A data set as the benchmark loads it from a folder, and as MMMU does its subset `Art`."""
    pictures = [compose(1_000_000_000 + n).image() for n in range(count)]
    picture = "decoded_image" if name == "math_vista" else "image"
    rows = {key: [value] * count for key, value in ROWS[name].items()}
    for key in {"id", "pid"} & rows.keys():
        rows[key] = [str(n) for n in range(count)]
    rows |= {"question": [QUESTION] * count, picture: pictures}
    table = datasets.Dataset.from_dict(rows).cast_column(picture, datasets.Image())
    subset = "Art" if name == "mmmu" else "default"
    (folder / subset).mkdir(parents=True)
    table.to_parquet(str(folder / subset / "questions.parquet"))
    files = f"data_files:\n  - split: {SPLITS[name]}\n    path: {subset}/*"
    config = f"configs:\n- config_name: {subset}\n  {files}"
    (folder / "README.md").write_text(f"---\n{config}\n---\n", encoding="utf-8")


def recipe(name: str, model: Path, more: str) -> str:
    """The page's, for a benchmark, a folder and a made data set."""
    text = RECIPE.replace("import mmstar as", f"import {name} as").replace(
        '"my-vlm"', repr(str(model))
    )
    line = next(line for line in text.splitlines() if line.startswith("sys.argv"))
    words = f"{name} --model my-vlm --temperature 0 --max-tokens 4 --output-dir results {more}"
    return text.replace(line, f"sys.argv = {words.split()!r}")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return host_folders.checkpoint("qwen2_5_vl", tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("name", ROWS)
def test_a_benchmark_of_mlx_vlms_prunes_and_answers_as_generate_does(
    name, model, tmp_path, monkeypatch, capsys
):
    write_questions(tmp_path / "data", name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    more = f"--dataset {tmp_path / 'data'} " + "--subset Art" * (name == "mmmu")
    module = import_module(f"mlx_vlm.evals.{name}")
    for attribute in ("load", "inference"):  # put back behind the test
        monkeypatch.setattr(module, attribute, getattr(module, attribute))
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(recipe(name, model, more), "recipe", "exec"), namespace)
    assert "75." in capsys.readouterr().out.splitlines()[-1]
    assert len(namespace["report"].prompts) == 2
    (table,) = (tmp_path / "results").rglob("*.csv")
    with table.open(encoding="utf-8") as lines:
        predictions = [row["prediction"] for row in csv.DictReader(lines)]
    loaded = load(model)
    expected = [
        generate(*loaded, QUESTION, compose(1_000_000_000 + n).image(), pruner="divprune",
                 keep_ratio=0.25, max_tokens=4).text
        for n in range(2)
    ]  # fmt: skip
    assert [text.strip() for text in predictions] == [text.strip() for text in expected]


def test_an_error_ends_the_recipe(model, tmp_path):
    write_questions(tmp_path / "data", "mmmu")
    text = recipe("mmmu", model, f"--dataset {tmp_path / 'data'} --subset Art")
    broken = text.replace("answer = benchmark.inference", "answer = lambda *_, **__: 1 / 0")
    file = tmp_path / "recipe.py"
    file.write_text(broken, encoding="utf-8")
    environment = {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(file)], cwd=tmp_path, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 1 and "error: division by zero" in done.stderr, done.stderr
    assert not [file for file in (tmp_path / "results").rglob("*") if file.is_file()]
