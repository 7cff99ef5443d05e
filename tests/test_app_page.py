"""Promises of what the app's page does where a model or an answer fails, without a browser."""

import asyncio
import gc
import logging
import os
import warnings
from dataclasses import replace
from functools import partial

import pytest

pytest.importorskip("gradio", reason="Gradio is not installed: pip install 'mlx-vlm-prune[app]'")

from mlx_vlm_prune import app
from mlx_vlm_prune.generation.arguments import build_app_parser
from mlx_vlm_prune.scenes import CHECKPOINT
from mlx_vlm_prune.webui import BUILT_IN
from mlx_vlm_prune.webui.conversations import Conversation
from mlx_vlm_prune.webui.model_thread import Models, ModelThread

SHARE = "share of the tokens"
BUDGET = ("divprune", SHARE, 50, None)
# Errors, what is said of each, and whether it is a fault of ours, which stands on stderr, too.
FAULTS = {
    "a missing package": (
        ModuleNotFoundError("No module named 'mlx_vlm'", name="mlx_vlm"),
        "this command needs mlx_vlm, which is not installed: pip install 'mlx-vlm-prune[mlx-vlm]'",
        False,
    ),
    "a full disk": (
        OSError(28, "No space left on device", "/a/b"), "/a/b: No space left on device", False,
    ),
    "no compiler": (RuntimeError("[Compile::eval_cpu] no g++"), "MLX cannot compile in ", False),
    "no memory": (
        RuntimeError("[malloc] Unable to allocate 9 bytes.\nmore"),
        "this failed with RuntimeError: [malloc] Unable to allocate 9 bytes.", True,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    thread, read = ModelThread(), partial(app.open_model, build_app_parser().parse_args([]))
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Gradio opens event loops, and leaves them
        for name, value in {**app.QUIET, "GRADIO_TEMP_DIR": str(folder)}.items():
            patch.setitem(os.environ, name, value)
        with app.without_stubs():
            from mlx_vlm_prune.webui.page import Page

        shown = Page(Models(thread, thread.run(read, BUILT_IN), read), thread, folder, 4)
        asyncio.get_event_loop().close()
        asyncio.set_event_loop(None)
        gc.collect()
    return shown


def test_a_model_that_was_trained_for_one_number_begins_with_auto(page, monkeypatch):
    """Its own method would refuse what the slider shows at first."""
    model = page.models.open(BUILT_IN).model
    monkeypatch.setattr(model, "config", replace(model.config, pruner=("attention_pool", 49)))
    assert page.open_model(BUILT_IN)[page.pruner].value == "auto"


@pytest.fixture
def talk(page):
    return Conversation(page.models.open(BUILT_IN), page.thread, 4)


def last_of(updates):
    *_, last = updates
    return last


def raising(problem):
    def fail(*arguments):
        raise problem
        yield

    return fail


def check_fault(page, updates, caplog, case):
    _, words, is_ours = FAULTS[case]
    sentence = updates[page.notice].value
    assert sentence.startswith(words) and "\n" not in sentence and updates[page.notice].visible
    assert caplog.messages == ([sentence] if is_ours else [])


@pytest.mark.parametrize("case", FAULTS)
def test_an_error_while_a_model_is_opened_is_a_sentence(page, monkeypatch, caplog, case):
    caplog.set_level(logging.INFO, "mlx_vlm_prune")
    opening = raising(FAULTS[case][0])
    monkeypatch.setattr(page.models, "open", lambda name: next(opening()))
    check_fault(page, page.open_model("a folder"), caplog, case)
    question = {"text": "is it red ?", "files": []}
    caplog.clear()
    check_fault(page, last_of(page.ask(None, question, *BUDGET)), caplog, case)


@pytest.mark.parametrize("case", FAULTS)
@pytest.mark.parametrize("name", ["full", "pruned"])
def test_an_error_while_an_answer_is_written_is_a_sentence_and_the_chat_goes_on(
    page, talk, monkeypatch, caplog, case, name
):
    caplog.set_level(logging.INFO, "mlx_vlm_prune")
    question = {"text": "is it red ?", "files": []}
    monkeypatch.setattr(getattr(talk, name), "stream", raising(FAULTS[case][0]))
    check_fault(page, last_of(page.ask(talk, question, *BUDGET)), caplog, case)
    assert talk.full.turns == talk.pruned.turns == []
    monkeypatch.undo()
    updates = last_of(page.ask(talk, question, *BUDGET))
    assert not updates[page.notice].visible and len(talk.full.turns) == len(talk.pruned.turns) == 1


def test_a_new_tab_talks_to_the_first_model_also_where_another_was_opened_since(page):
    opened = page.open_model(str(CHECKPOINT))
    assert opened[page.talk].opened.name == str(CHECKPOINT)
    start, *_ = page.ask(None, {"text": "is it red ?", "files": []}, *BUDGET)
    assert start[page.talk].opened.name == BUILT_IN
    assert page.begin(None)[page.notice].visible is False  # nothing was asked yet
