"""Promises of what the server holds: answers fit into memory, and nothing is held twice."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_prune import generate, load
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.generation import running_batch
from mlx_vlm_prune.generation.prompt_reader import PromptReader
from mlx_vlm_prune.generation.request import Request
from mlx_vlm_prune.generation.running_batch import OwnRunningBatch
from mlx_vlm_prune.generation.stream import pipeline_for, prepare_prompt
from mlx_vlm_prune.machine.bounded_store import BoundedStore
from mlx_vlm_prune.machine.clock import Clock
from mlx_vlm_prune.models.cache import STEP
from mlx_vlm_prune.models.joined_prompts import JoinedPrompts
from mlx_vlm_prune.planning import calibration

from .golden_requests import make_folder
from .serving import Served, noise, question, serve, slow_down, text_of
from .test_serve_load import LONG, open_stream, wait_for

from mlx_vlm_prune.serving import memory, time_budget  # isort: skip - need FastAPI
from mlx_vlm_prune.serving.memory import COPIES, SHARE, AnswerMemory  # isort: skip

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A model whose answers do not end by themselves."""
    return load(make_folder(tmp_path_factory.mktemp("memory")) / "tiny", dtype="float32")


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    """Models of mlx-vlm's by their kind, loaded once."""
    pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")
    from . import host_folders

    home, models = tmp_path_factory.mktemp("hosts"), dict[str, Any]()

    def of_kind(kind: str) -> Any:
        if kind not in models:
            models[kind] = load(host_folders.checkpoint(kind, home), dtype="float32")
        return models[kind]

    return of_kind


@pytest.mark.parametrize("kind", ["ours", "llava", "qwen2_5_vl", "qwen3_vl", "smolvlm"])
def test_the_bytes_of_a_row_are_those_of_the_caches(kind, loaded, request):
    model = loaded if kind == "ours" else request.getfixturevalue("hosts")(kind)
    words = "how many stars ?" if kind == "ours" else "w7 w9 w3"
    whole = generate(*model, words, [], max_tokens=1)
    counted = AnswerMemory.of(*model, 0)
    assert counted.row_bytes * whole.prompt_tokens == whole.cache_bytes > 0
    assert counted.most_bytes > 1e6


def free_for(model: Any, answers: float) -> int:
    """What must be free for so many answers of one step of rows."""
    row = AnswerMemory.of(*model, 0).row_bytes
    return int(answers * COPIES * STEP * row / SHARE)


def test_answers_wait_until_there_is_memory_for_their_rows(loaded, monkeypatch):
    free = free_for(loaded, 1.5)
    monkeypatch.setattr(memory, "free_bytes", lambda: free)
    slow_down(OwnRunningBatch, monkeypatch)
    with serve(*loaded, cache_bytes=0) as server, ThreadPoolExecutor(1) as other:
        with open_stream(server, 100):
            waiting = other.submit(server.chat, question("yes ?"), max_tokens=5)
            wait_for(lambda: server.metric("requests_waiting") == 1)
            assert server.metric("requests_running") == 1
        assert text_of(waiting.result())
        status, sentence = server.refusal(question("yes ?"), max_tokens=LONG)
        assert status == 400 and f"this server has memory for {STEP} together" in sentence
        assert sentence.endswith(memory.FEWER_TOKENS)
        assert server.chat(question("yes ?"), max_tokens=STEP // 2)


def test_two_answers_run_where_there_is_memory_for_two(loaded, monkeypatch):
    free = free_for(loaded, 2.5)
    monkeypatch.setattr(memory, "free_bytes", lambda: free)
    slow_down(OwnRunningBatch, monkeypatch)
    with (
        serve(*loaded, cache_bytes=0) as server,
        open_stream(server, 100),
        open_stream(server, 100),
    ):
        assert server.metric("requests_waiting") == 0
        assert server.metric("requests_running") == 2


def most_at_once(server: Served, message: Any, **options: Any) -> float:
    """Of two requests, how many are answered at once."""
    with ThreadPoolExecutor(2) as others:
        answers = [others.submit(server.chat, message, **options) for _ in range(2)]
        most = 0.0
        while not all(one.done() for one in answers):
            most = max(most, server.metric("requests_running"))
        assert all(text_of(one.result()) for one in answers)
    return most


def test_prompts_are_counted_with_the_tokens_that_their_budgets_keep(loaded, monkeypatch):
    """All tokens of sixteen pictures are more than one step of rows."""
    message = question("a ?", *[noise(20, 20, seed) for seed in range(16)])
    slow_down(OwnRunningBatch, monkeypatch)
    pruned = [{"visual_tokens": 2}, {"keep_ratio": 0.25, "pruner": "norm"}]
    full = [{}, {"visual_tokens": 9, "pruner": "fastv"}]  # which leave behind a layer
    free = free_for(loaded, 1.5)
    monkeypatch.setattr(memory, "free_bytes", lambda: free)
    with serve(*loaded, cache_bytes=0) as server:
        for budget in pruned:
            assert server.chat(message, **budget, max_tokens=2)
        for budget in full:
            sentence = server.refusal(message, **budget, max_tokens=2)[1]
            assert f"its answer may have 2; this server has memory for {STEP} tog" in sentence
            assert sentence.endswith(memory.FEWER_ROWS)
    free = free_for(loaded, 2.5)
    with serve(*loaded, cache_bytes=0) as server:
        assert most_at_once(server, message, **pruned[0], max_tokens=40) == 2
        assert most_at_once(server, message, max_tokens=40) == 1


@pytest.mark.parametrize("spec", ["norm", "avgpool", "visionzip+divprune", "fastv", "norm+restore"])
def test_rows_that_are_left_are_those_that_are_then_read(spec, loaded):
    request = Request("how many stars ?", [noise(30, 30), noise(30, 30, 1)], spec, keep_tokens=9)
    batch = OwnRunningBatch(*loaded)
    prepared = batch.prepare(request)
    rows = batch.rows_left(prepared)
    assert rows == batch.add("a", prepared).rows
    assert (rows < prepared.rows) == (spec != "fastv")


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl", "qwen3_vl", "smolvlm"])
def test_rows_that_are_left_of_mlx_vlms_prompts_are_never_counted_as_fewer(kind, hosts):
    from mlx_vlm_prune.hosts.running_batch import HostRunningBatch

    pictures, batch = [noise(120, 120), noise(90, 120, 1)], HostRunningBatch(*hosts(kind), 4)
    try:
        for budget in ({"keep_ratio": 0.25}, {"keep_tokens": 9}, {}):
            prepared = batch.prepare(Request("w7 w9", pictures, "norm", **budget, max_tokens=1))
            rows = batch.rows_left(prepared)
            read = batch.add(str(budget), prepared).rows
            assert read <= rows <= read + len(pictures) and rows < prepared.rows
        rows = batch.rows_left(prepared, low_detail=True)
        assert batch.add("low", batch.prepare(prepared.request), low_detail=True).rows <= rows
    finally:
        batch.close()


def test_answers_of_mlx_vlms_wait_for_memory_too(hosts, monkeypatch):
    from mlx_vlm_prune.hosts.running_batch import HostRunningBatch

    model = hosts("llava")
    slow_down(HostRunningBatch, monkeypatch)
    monkeypatch.setattr(model[1].tokenizer.stopping_criteria, "eos_token_ids", [])
    free = free_for(model, 1.5)
    monkeypatch.setattr(memory, "free_bytes", lambda: free)
    with serve(*model, cache_bytes=0) as server:
        assert most_at_once(server, question("w7"), max_tokens=40) == 1


def test_more_for_earlier_prompts_than_there_is_free_is_refused(loaded, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda: 500_000_000)
    with pytest.raises(UserError, match=r"cache_gb is 1, and 0\.5 GB are free"):
        AnswerMemory.of(*loaded, 1_000_000_000)


def added(batch: Any, key: str, request: Request) -> None:
    batch.add(key, batch.prepare(request))


def test_a_prompt_that_joined_is_held_once(loaded):
    request = Request("how many stars ?", [noise(30, 30)], "norm", keep_tokens=5, max_tokens=4)
    batch = OwnRunningBatch(*loaded, 1_000_000)
    added(batch, "a", request)
    (running,) = batch.answers
    assert running.held and running.held.cache == []
    while len(batch):
        batch.step()
    assert len(batch.reader.rows) == 1
    forgetful = OwnRunningBatch(*loaded, 0)
    added(forgetful, "a", request)
    assert forgetful.answers[0].held is None


@pytest.mark.parametrize(("most_bytes", "copies"), [(1_000_000, 1), (100, 0)])
def test_rows_that_are_more_than_can_be_held_are_not_copied(
    most_bytes, copies, loaded, monkeypatch
):
    copied, rows_of = [], JoinedPrompts.rows_of

    def noted(self: JoinedPrompts, prompts: Any) -> Any:
        copied.append(prompts)
        return rows_of(self, prompts)

    monkeypatch.setattr(JoinedPrompts, "rows_of", noted)
    batch = OwnRunningBatch(*loaded, most_bytes)
    added(batch, "a", Request("how many stars ?", [], max_tokens=2))
    while len(batch):
        batch.step()
    assert len(copied) == len(batch.reader.rows) == copies


def test_of_a_prompt_of_mlx_vlms_no_pixels_are_held(hosts):
    from mlx_vlm_prune.hosts.running_batch import HostRunningBatch

    batch = HostRunningBatch(*hosts("llava"), 4)
    try:
        added(batch, "a", Request("w7", [noise(30, 30)], "norm", keep_tokens=5))
        (running,) = batch.answers.values()
        held = {name for name, value in vars(running).items() if value is not None}
        assert held == {"key", "clock", "room", "trace", "pipeline", "policy"}
    finally:
        batch.close()


def test_what_is_held_of_a_picture_is_computed(loaded):
    """What is not belongs to the thread that put it there, with all that it is computed from."""
    reader, budget = PromptReader(*loaded, 10_000_000), {"pruner": "norm", "keep_tokens": 5}
    request, pipeline = Request("a ?", [noise(30, 30)], **budget), pipeline_for(loaded[0], "norm")

    def read() -> None:
        (picture,), _ = reader.open(request, Clock())
        reader.encode(picture, pipeline, pipeline.budgets(loaded[0].N, 5))

    thread = threading.Thread(target=read)
    thread.start()
    thread.join()
    ((_, batch),) = reader.features
    assert np.isfinite(np.array(batch.encoded.x_BND)).all()


def test_memory_goes_back_when_nobody_is_answered(loaded, monkeypatch):
    calls, clear = [], mx.clear_cache
    monkeypatch.setattr(mx, "clear_cache", lambda: calls.append(len(batch)) or clear())
    monkeypatch.setattr(running_batch, "CLEAR_EVERY", 3)
    batch: Any = []
    batch = OwnRunningBatch(*loaded)
    calls.clear()
    added(batch, "a", Request("yes ?", [], max_tokens=5))
    for _ in range(5):
        batch.step()
    assert calls == [1, 0]  # behind three steps, and when the last answer has left
    assert not len(batch)


def test_biases_leave_with_the_prompts_that_have_them(loaded):
    model, processor = loaded
    joined = JoinedPrompts()
    for spec, K in (("norm+restore", 4), ("norm", 4)):
        prepared = prepare_prompt(model, processor, "a ?", [noise(30, 30)])
        joined.add(model([prepared.prompt], prepared.pixels, pipeline_for(model, spec), K))
    assert joined.batch and joined.batch.cache[0].bias_BS is not None
    (alone,) = {cache.bias_BS is None for cache in joined.rows_of([1])}
    assert alone
    joined.keep([1])
    assert all(cache.bias_BS is None for cache in joined.batch.cache)


def test_a_store_may_hold_so_many_values():
    store = BoundedStore[str](most_values=2)
    for key in "abc":
        store.put(key, key, 1)
    assert [key for key, _ in store] == ["b", "c"] and store.nbytes == 2


def test_a_server_calibrates_at_its_start_alone_and_writes_nothing(loaded, monkeypatch, tmp_path):
    monkeypatch.setenv("MLX_VLM_PRUNE_CACHE", str(tmp_path))
    monkeypatch.setenv(calibration.SECONDS_VARIABLE, "0.1")
    threads, measure = list[str](), calibration.measure

    def noted(*arguments: Any) -> Any:
        threads.append(threading.current_thread().name)
        return measure(*arguments)

    monkeypatch.setattr(calibration, "measure", noted)
    message = question("a ?", noise(30, 30))
    with serve(*loaded, method="norm", is_pruning=True, budget_ms=1e6) as server:
        at_start = len(threads)
        assert at_start and set(threads) == {threading.current_thread().name}
        usage = server.chat(message, max_tokens=1)["usage"]
        assert usage["visual_tokens_kept"] == usage["visual_tokens"]
        other = server.chat(message, budget_ms=1e6, pruner="uniform", max_tokens=1)
        assert other["warnings"] == [time_budget.NOT_CALIBRATED.format("norm")]
        words = question("is it red ? " * 200, noise(30, 30))
        assert "extrapolation" in server.chat(words, max_tokens=1)["warnings"][0]
        assert len(threads) == at_start
    with serve(*loaded) as server:
        sentence = time_budget.NOT_CALIBRATED.format("no method")
        strict = {"budget_ms": 5.0, "strict": True}
        assert server.refusal(message, **strict) == (400, sentence)
    assert not [*tmp_path.iterdir()]
