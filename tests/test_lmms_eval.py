"""Promises of lmms-eval's model, with lmms-eval's own evaluator on small tasks of ours; no network.

lmms-eval brings some hundred packages, so `make test` does without it: `make test-lmms-eval`.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: make test-lmms-eval")

from mlx_vlm_prune import generate, load
from mlx_vlm_prune.checkpoints.errors import UserError

from .entry_points import ROOT
from .lmms_tasks import write_tasks
from .serving import serve

PAGE = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")
PRUNED = {"pruner": "divprune", "keep_ratio": 0.25}
COMMAND = "import sys; from lmms_eval.cli.dispatch import main; sys.exit(main())"


@dataclass(frozen=True)
class Run:
    """How `lmms-eval eval` ended: exit code, all that it printed, and its results, if any."""

    code: int
    printed: str
    results: dict[str, Any] | None
    samples: dict[str, list[dict[str, Any]]]

    def texts(self, task: str) -> list[str]:
        """The answers to a task's questions, in their order."""
        listed = sorted(self.samples[task], key=lambda sample: sample["doc_id"])
        answers = [sample["filtered_resps"] for sample in listed]
        return [answer if isinstance(answer, str) else answer[0] for answer in answers]


def evaluate(tasks: Path, out: Path, *arguments: str) -> Run:
    """`lmms-eval eval` with tasks of a folder, in a process of its own."""
    folders = {"HF_HOME": str(out / "hf"), "MLX_VLM_PRUNE_CACHE": str(out / "cache")}
    environment = {**os.environ, **folders, "HF_HUB_OFFLINE": "1", "no_proxy": "127.0.0.1"}
    words = [sys.executable, "-c", COMMAND, "eval", "--include_path", str(tasks), "--log_samples",
             "--output_path", str(out), *arguments]  # fmt: skip
    done = subprocess.run(
        words, cwd=tasks, env=environment, capture_output=True, text=True, check=False, timeout=240
    )
    printed = done.stdout + done.stderr
    result, *_ = [*out.rglob("*_results.json"), None]
    samples = {
        re.sub(r"^\d+_\d+_samples_", "", file.stem): [
            json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()
        ]
        for file in out.rglob("*_samples_*.jsonl")
    }
    results = json.loads(result.read_text(encoding="utf-8")) if result else None
    return Run(done.returncode, printed, results, samples)


def figure(run: Run, task: str, name: str) -> float:
    assert run.results, run.printed
    return float(run.results["results"][task][f"{name},none"])


def pictures(folder: Path, names: Sequence[str]) -> list[Image.Image]:
    return [Image.open(folder / name).convert("RGB") for name in names]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lmms") / "tasks"
    return folder, write_tasks(folder)


@pytest.fixture(scope="module")
def scenes():
    return load()


def alone(loaded: Any, folder: Path, docs: Sequence[dict], **options: Any) -> list[str]:
    """What `generate` answers to the documents of `scenes_answered`."""
    return [
        generate(*loaded, doc["question"], pictures(folder, doc["pictures"]), **options).text
        for doc in docs
    ]


def test_answers_are_those_of_generate_and_are_scored_by_lmms_eval(tasks, scenes, tmp_path):
    folder, docs = tasks
    run = evaluate(folder, tmp_path, "--model", "mlx_vlm_prune", "--model_args",
                   "pruner=divprune,keep_ratio=0.25", "--tasks", "scenes_answered,scenes_talked",
                   "--batch_size", "3")  # fmt: skip
    assert run.code == 0, run.printed
    expected = alone(scenes, folder, docs, **PRUNED, max_tokens=8)
    assert run.texts("scenes_answered") == expected
    right = [text.strip() == doc["answer"] for text, doc in zip(expected, docs, strict=True)]
    assert figure(run, "scenes_answered", "right") == sum(right) / len(docs)
    assert sum(right) > 0, "the model knows some of them"
    for sample in run.samples["scenes_answered"]:
        counts = sample["token_counts"][0]
        assert counts["output_tokens"] > 1 and counts["input_tokens"] < 196
    assert run.results and run.results["throughput"]["avg_visual_tokens"] > 0
    assert len(run.texts("scenes_talked")) == len(docs)
    assert all("z" not in text for text in run.texts("scenes_talked"))


def test_a_model_of_mlx_vlms_and_a_task_without_messages(tasks, scenes, tmp_path):
    from . import host_folders

    folder, docs = tasks
    words = tmp_path / "words"
    listed = write_tasks(words, 2, words=True)
    model = host_folders.checkpoint("qwen2_5_vl", tmp_path)
    run = evaluate(words, tmp_path / "a", "--model", "mlx_vlm_prune", "--model_args",
                   f"model={model},pruner=divprune,keep_ratio=0.25,dtype=float32", "--tasks",
                   "scenes_answered")  # fmt: skip
    expected = alone(load(model, dtype="float32"), words, listed, **PRUNED, max_tokens=8)
    assert run.texts("scenes_answered") == expected, run.printed
    chosen = evaluate(folder, tmp_path / "b", "--model", "mlx_vlm_prune", "--force_simple",
                      "--tasks", "scenes_answered", "--batch_size", "2")  # fmt: skip
    assert chosen.code == 0, chosen.printed
    assert chosen.texts("scenes_answered") == alone(scenes, folder, docs, max_tokens=8)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model_args", "pruner=nonsense"], "no pruner is called 'nonsense'"),
        (["--gen_kwargs", "num_beams=2"], "question 0 of scenes_answered: num_beams is 2"),
    ],
)
def test_an_error_is_an_error_and_no_score(tasks, tmp_path, arguments, sentence):
    run = evaluate(tasks[0], tmp_path, "--model", "mlx_vlm_prune", "--tasks", "scenes_answered",
                   "--verbosity", "DEBUG", *arguments)  # fmt: skip
    assert run.code == 1 and run.results is None and not run.samples
    assert f"UserError: {sentence}" in run.printed


def test_losses_are_refused_in_one_sentence():
    from mlx_vlm_prune.evaluation.harness.model import PrunedModel, SimplePrunedModel

    request = SimpleNamespace(doc_id=3, task_name="scenes_chosen")
    for each in (PrunedModel, SimplePrunedModel):
        with pytest.raises(UserError, match="question 3 of scenes_chosen compares losses of given"):
            each.loglikelihood(SimpleNamespace(), [request])


def test_a_broken_picture_ends_the_run(tmp_path):
    folder = tmp_path / "tasks"
    write_tasks(folder)
    (folder / "2.png").write_bytes(b"no picture")
    run = evaluate(folder, tmp_path / "out", "--model", "mlx_vlm_prune", "--tasks",
                   "scenes_answered", "--verbosity", "DEBUG")  # fmt: skip
    assert run.code == 1 and run.results is None and not run.samples


def commands() -> list[list[str]]:
    """Those of docs/evaluation.md that start lmms-eval."""
    text = "\n".join(re.findall(r"```bash\n(.*?)```", PAGE, re.S)).replace("\\\n", " ")
    return [shlex.split(line) for line in text.splitlines() if line.startswith("lmms-eval eval ")]


def test_the_pages_commands_run_the_direct_one_and_the_one_through_the_server(
    tasks, scenes, tmp_path
):
    folder, docs = tasks
    direct, through_server = commands()
    expected = alone(scenes, folder, docs, **PRUNED, max_tokens=8)
    with serve(*scenes, method="divprune", is_pruning=True, keep_ratio=0.25) as server:
        for n, command in enumerate((direct, through_server)):
            words = [word.replace("8080", str(server.port)) for word in command[2:]]
            words[words.index("--tasks") + 1] = "scenes_answered"
            words[words.index("--output_path") + 1] = str(tmp_path / str(n))
            if "--limit" in words:
                words[words.index("--limit") + 1] = "4"
            place = words.index("--model_args") + 1
            if n == 0:
                words[place] = words[place].replace("model=my-model,", "")
            run = evaluate(folder, tmp_path / str(n), *words)
            assert run.texts("scenes_answered") == expected, run.printed
        assert server.metric('requests_total{status="200"}') == len(docs)
