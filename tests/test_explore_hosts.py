"""Promises of `explore` in mlx-vlm's models: every view of an image, log-probabilities, words."""

import pytest

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")

from types import SimpleNamespace

import numpy as np

from mlx_vlm_prune import explore, generate, load
from mlx_vlm_prune.evaluation.predicted_times import CountedTimes
from mlx_vlm_prune.hosts.families import host_of
from mlx_vlm_prune.planning.host_operations import language_sizes
from mlx_vlm_prune.planning.operations import prefill
from mlx_vlm_prune.pruners import plan

from . import host_folders
from .host_models import cached_models
from .test_explore_command import content_of

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own
NAMES = ("llava", "qwen2_5_vl")
PROMPT = "w1 w2"


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    return host_folders.desk(tmp_path_factory.mktemp("desk"), NAMES)


@pytest.fixture(scope="module", params=NAMES)
def explored(desk, request):
    """What is explored of two pictures by a host, and its folder."""
    folder = desk / request.param
    explore.main([
        "--model", str(folder), "--image", str(desk / "a.png"), str(desk / "b.png"), "--prompt",
        PROMPT, "--pruner", "fastv", "mmtok", "downsample", "--keep-ratio", "0.75",
        "--max-tokens", "3", "--out", str(desk / "page.html"),
    ])  # fmt: skip
    return content_of(desk / "page.html"), folder


def test_each_answer_keeps_what_generate_keeps_of_every_view(explored, desk):
    content, folder = explored
    model, processor = load(folder)
    assert [row["pruner"] for row in content["answers"]] == ["none", "fastv", "mmtok"]
    assert [refusal["pruner"] for refusal in content["refused"]] == ["downsample"]
    for row in content["answers"]:
        budget = {} if row["pruner"] == "none" else {"keep_ratio": 0.75}
        result = generate(
            model, processor, PROMPT, [desk / "a.png", desk / "b.png"], pruner=row["pruner"],
            max_tokens=3, **budget,
        )  # fmt: skip
        assert (row["kept_indices"], row["text"]) == (result.kept_indices, result.text)
        kept: dict[int, list[int]] = {}
        for view, left in zip(content["views"], row["steps"][-1]["views"], strict=True):
            image = kept.setdefault(view["image"], [])
            image += [view["first"] + index for index in left["kept"]]
        assert [*kept.values()] == result.kept_indices


def test_log_probabilities_of_the_greedy_answer_are_the_highest(explored):
    content, _ = explored
    for row in content["answers"][1:]:
        this, full = row["logprobs"]["answer"], row["logprobs"]["full_answer"]
        assert (
            len(this["pruned"]) == len(this["full"]) == len(row["token_ids"]) == len(row["tokens"])
        )
        assert max(this["pruned"] + full["full"]) <= 0
        assert sum(this["pruned"]) >= sum(full["pruned"]) - 1e-4  # no other beats the greedy one
        assert sum(full["full"]) >= sum(this["full"]) - 1e-4


def test_times_are_predicted_from_the_operations_of_the_language_model(explored):
    content, folder = explored
    sizes = language_sizes(host_of(*load(folder)))
    full, *pruned = content["answers"]
    text = full["prompt_tokens"] - full["visual_tokens"]

    def operations(row) -> int:
        runs = [[run["visual_tokens"]] * (run["last"] - run["first"] + 1) for run in row["layers"]]
        return prefill(sizes, [text + visual for run in runs for visual in run])

    assert full["predicted_ms"] is None and "operations" in content["prediction"]
    speeds = []
    for row in pruned:
        times = row["predicted_ms"]
        assert times.keys() == {"image", "vision", "prefill", "total"}
        assert times["total"] == sum(ms for part, ms in times.items() if part != "total")
        speeds.append(operations(row) / times["prefill"])
    assert min(speeds) == pytest.approx(max(speeds)) and operations(pruned[0]) < operations(full)


def test_times_are_predicted_where_requests_are_timed_as_a_whole(desk, monkeypatch):
    """As on a GPU."""
    monkeypatch.setattr("mlx_vlm_prune.machine.clock.on_cpu", lambda: False)
    explore.main([
        "--model", str(desk / "llava"), "--image", str(desk / "a.png"), "--prompt", PROMPT,
        "--pruner", "fastv", "--keep-ratio", "0.75", "--max-tokens", "1",
        "--out", str(desk / "gpu.html"),
    ])  # fmt: skip
    _, row = content_of(desk / "gpu.html")["answers"]
    assert row["predicted_ms"].keys() == {"image", "vision", "prefill", "total"}


def test_nothing_is_asked_where_operations_are_not_counted():
    times = CountedTimes(host_of(cached_models()("qwen3_5")), lambda **_: pytest.fail("asked"))
    case = SimpleNamespace(pipeline=plan("norm"))
    assert times.of_answer(case, None, None) is None
    assert times.about.startswith("nothing: ")


def test_words_are_read_of_every_view(explored):
    content, _ = explored
    (row,) = [row for row in content["answers"] if row["pruner"] == "mmtok"]
    assert {each["view"] for each in row["words"]} == {0, 1}
    for each in row["words"]:
        attention = np.array(each["attention"], float)
        assert attention.shape == (len(each["words"]), content["views"][each["view"]]["tokens"])
        assert len(each["words"]) and np.abs(attention).max() <= 1  # likeness: a cosine
