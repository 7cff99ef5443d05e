"""Promises of the server's parts: joined prompts, rows of earlier ones, stop texts, times."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_vlm_prune import load
from mlx_vlm_prune.generation.prompt_reader import PromptReader
from mlx_vlm_prune.generation.request import Request
from mlx_vlm_prune.generation.stop_strings import StopStrings
from mlx_vlm_prune.generation.stream import pipeline_for, prepare_prompt
from mlx_vlm_prune.inputs.budget import low_detail_tokens
from mlx_vlm_prune.machine.bounded_store import BoundedStore
from mlx_vlm_prune.machine.clock import request_clock
from mlx_vlm_prune.models.joined_prompts import JoinedPrompts

from . import backbones, calibrations, tiny
from .golden_requests import make_folder
from .serving import ServerSettings, noise, question, serve

from mlx_vlm_prune.serving import time_budget  # isort: skip - needs FastAPI
from mlx_vlm_prune.serving.request_schema import check_body  # isort: skip
from mlx_vlm_prune.serving.visual_budget import (  # isort: skip
    HIGH_WITHOUT_METHOD, MIXED_DETAILS, visual_budget,
)  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def loaded(home):
    return load(home / "tiny", dtype="float32")


# Prompts: a text, whether a picture comes with it, a method and K.
PROMPTS = [
    ("how many stars ?", True, "norm", 5), ("is it red ?", False, "none", 16),
    ("what is left of the star ?", True, "fastv", 9), ("a ?", True, "norm+restore", 4),
]  # fmt: skip


def prefills(model, processor, prompts=PROMPTS):
    """Each prompt, read alone."""
    read = []
    for text, has_picture, spec, K in prompts:
        images = [noise(70, 80)] if has_picture else []
        prepared = prepare_prompt(model, processor, text, images)
        read.append(model([prepared.prompt], prepared.pixels, pipeline_for(model, spec), K))
    return read


def logits_alone(model, processor, tokens, prompts=PROMPTS):
    """(prompt, step, word) of the same tokens, each prompt alone."""
    steps = [
        [np.array(one.step(mx.array([[t]]))[0, -1]) for t in tokens]
        for one in prefills(model, processor, prompts)
    ]
    return np.array(steps)


def test_prompts_join_and_leave_and_each_computes_what_it_does_alone(loaded):
    """They have other lengths, methods, positions and biases, and one has fewer rows in later
    layers."""
    tokens = [3, 9, 4, 7, 5, 6]
    expected = logits_alone(*loaded, tokens)
    joined, running = JoinedPrompts(), list[int]()
    coming = prefills(*loaded)
    for step, token in enumerate(tokens):
        if step < len(coming):  # one joins behind each token; so each is at another of its tokens
            joined.add(coming[step])
            running.append(step)
        if step == 4:
            joined.keep([running.index(b) for b in (0, 2)])
            running = [0, 2]
        tokens_B1 = mx.array([[tokens[step - b]] for b in running])
        logits = np.array(joined.step(tokens_B1))
        assert len(joined) == len(running) and token
        for b, row in zip(running, logits, strict=True):
            np.testing.assert_allclose(row, expected[b, step - b], atol=2e-5, rtol=1e-4)
    joined.keep([])
    assert len(joined) == 0


def test_states_without_rows_join_and_leave_too(tmp_path):
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    model = load(backbones.write("mamba", tmp_path), dtype="float32")
    prompts, tokens = [("how many stars ?", True, "norm", 5), ("a ?", False, "none", 16)], [3, 9, 4]
    expected = logits_alone(*model, tokens, prompts)
    joined = JoinedPrompts()
    for one in prefills(*model, prompts):
        joined.add(one)
    for step, token in enumerate(tokens):
        if step == 2:
            joined.keep([1])
        logits = np.array(joined.step(mx.array([[token]] * len(joined))))
        wanted = expected[1:, step] if step == 2 else expected[:, step]
        np.testing.assert_allclose(logits, wanted, atol=2e-5, rtol=1e-4)


def test_rows_that_a_prompt_leaves_are_its_own_without_padding(loaded):
    joined, coming = JoinedPrompts(), prefills(*loaded)
    for one in coming:
        joined.add(one)
    for b, one in enumerate(coming):
        for part, layer in zip(joined.rows_of([b]), one.cache, strict=True):
            assert part.rows == layer.rows and not part.held.padded
            assert mx.array_equal(part.keys, layer.keys)
            assert mx.array_equal(part.positions_BS, layer.positions_BS)


def read(reader, text, seed=0, **options):
    """What is read of a prompt, whose rows are then held."""
    request, clock = Request(text, [noise(70, 80, seed)], **options), request_clock()
    prompt = reader.read(request, *reader.open(request, clock), clock)
    if held := reader.take_rows():
        reader.keep(held)
    return prompt


def test_rows_are_found_by_picture_method_and_budget_in_any_conversation(loaded):
    reader = PromptReader(*loaded, 100_000_000)
    budget = {"pruner": "norm", "keep_tokens": 5}
    ahead = len(loaded[1].tokenizer.encode("<|im_start|>user\n"))
    first = read(reader, "how many stars ?", **budget)
    assert first.rows_reused == 0
    same = read(reader, "how many stars ?", **budget)
    assert same.rows_reused == same.prefill.rows[0] - 1
    assert read(reader, "is it red ?", **budget).rows_reused >= ahead + 5
    for change in ({"keep_tokens": 6}, {"pruner": "uniform"}, {"seed": 1}):
        other = read(reader, "how many stars ?", **{**budget, **change})
        assert other.rows_reused == ahead, change  # what stands before the picture
    assert read(reader, "a ?", pruner="fastv", keep_tokens=9).rows_reused == 0
    np.testing.assert_allclose(
        same.prefill.logits_BV, first.prefill.logits_BV, atol=2e-5, rtol=1e-4
    )


def test_a_prompt_that_goes_on_changes_no_rows_of_another(loaded):
    """Two prompts begin with the same rows; each then reads its own."""
    reader = PromptReader(*loaded, 100_000_000)
    budget = {"pruner": "norm", "keep_tokens": 5}
    read(reader, "how many stars ?", **budget)
    one, two = read(reader, "is it red ?", **budget), read(reader, "a ?", **budget)
    fresh = PromptReader(*loaded, 0)
    for text, prompt in (("is it red ?", one), ("a ?", two)):
        expected = read(fresh, text, **budget)
        assert expected.rows_reused == 0 < prompt.rows_reused
        for token in (3, 9):
            step = mx.array([[token]])
            np.testing.assert_allclose(
                prompt.prefill.step(step), expected.prefill.step(step), atol=2e-5, rtol=1e-4
            )


def test_what_is_held_has_a_bound(loaded):
    reader = PromptReader(*loaded, 60_000)
    for n in range(30):
        read(reader, "how many stars ?", seed=n, pruner="norm", keep_tokens=5)
        assert reader.rows.nbytes <= 30_000 and reader.features.nbytes <= 30_000
    assert 1 < len(reader.rows) < 30 and 1 < len(reader.features) < 30


def test_a_store_forgets_what_was_used_least_recently():
    store = BoundedStore[str](10)
    for key in "abc":
        store.put(key, key.upper(), 3)
    assert store.get("a") == "A"
    store.put("d", "D", 4)
    assert [key for key, _ in store] == ["c", "a", "d"] and store.nbytes == 10
    store.put("e", "E", 11)
    store.put("a", "AA", 1)
    assert [value for _, value in store] == ["C", "D", "AA"] and store.nbytes == 8
    store.drop("no")
    store.clear()
    assert (len(store), store.nbytes, store.get("a")) == (0, 0, None)


@given(st.lists(st.text("ab§", max_size=4), max_size=8), st.lists(st.text("ab§", min_size=1)))
def test_a_stop_text_is_found_however_the_answer_is_cut(pieces, stop):
    stops, text = StopStrings(stop), "".join(pieces)
    sent = ""
    for n, piece in enumerate(pieces, 1):
        sent += stops.add(piece, n == len(pieces))
        if stops.is_found:
            break
    places = [place for one in stop if (place := text.find(one)) >= 0]
    assert stops.is_found == bool(places)
    assert text.startswith(sent) and (places or sent == text)
    assert not any(one in sent for one in stop)


@pytest.mark.parametrize(("N", "K"), [(16, 16), (64, 64), (196, 64), (576, 64), (900, 100)])
def test_low_detail_is_64_tokens_or_a_ninth(N, K):
    assert low_detail_tokens(N) == K


def test_detail_high_says_that_it_uses_no_method_of_the_request():
    message = {"messages": [{"role": "user", "content": "?"}]}
    for pruner, warnings in (
        ("divprune", [HIGH_WITHOUT_METHOD.format("'divprune'")]), ("none", []), (None, []),
    ):  # fmt: skip
        body = check_body({**message, "pruner": pruner})
        budget, sentences = visual_budget(body, ["high"], ServerSettings("tiny"))
        assert (budget.pruner, sentences) == ("none", warnings)
        _, (mixed, *others) = visual_budget(body, ["low", "high"], ServerSettings("tiny"))
        assert mixed == MIXED_DETAILS.format("high") and others == warnings


def slow_machine() -> calibrations.Calibration:
    """The tower takes 100 ms, a row of the language model 100."""
    settings = [run.setting for run in calibrations.RUNS]
    rows = {s: float(100 * (s[1] + s[2] * s[0])) for s in settings}
    return calibrations.of(*(calibrations.run(*s, prefill=rows[s]) for s in settings))


def test_milliseconds_choose_k_and_what_cannot_be_is_a_warning(loaded, monkeypatch):
    calls = []

    def present(*_: object) -> object:
        calls.append(1)
        return slow_machine(), 1.0

    monkeypatch.setattr(time_budget, "present_calibration", present)
    message = question("a ?", noise(70, 80))

    def kept(server, ms):
        content = server.chat(message, budget_ms=ms, pruner="norm", max_tokens=1)
        return content["usage"]["visual_tokens_kept"], content["warnings"]

    with serve(*loaded, method="norm", budget_ms=9000.0) as server:
        few, more, every = (kept(server, ms)[0] for ms in (1600.0, 2000.0, 9000.0))
        assert 1 <= few < more < every == tiny.N
        tokens, (warning,) = kept(server, 50.0)
        assert tokens == tiny.N and "cannot meet 50 ms" in warning and len(calls) == 1
        strict = {"budget_ms": 50.0, "pruner": "norm", "strict": True}
        assert "cannot meet 50 ms" in server.refusal(message, **strict)[1]
        refusal = server.refusal(message, budget_ms=500.0, pruner="mlp:dynamic")
        assert "gives each image a number of its own" in refusal[1]
        assert server.chat(question("a ?"), budget_ms=5.0, max_tokens=1)["warnings"] == []
