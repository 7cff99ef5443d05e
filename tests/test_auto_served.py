"""`auto` on a server and in the app: a request's budget is enough, and its usage says why."""

from functools import partial

import pytest

from mlx_vlm_prune import generate, load
from mlx_vlm_prune.app import open_model
from mlx_vlm_prune.generation.arguments import build_app_parser
from mlx_vlm_prune.scenes import compose
from mlx_vlm_prune.webui import BUILT_IN
from mlx_vlm_prune.webui.conversations import Conversation, TokenBudget, figures_line
from mlx_vlm_prune.webui.model_thread import ModelThread

from .serving import question, serve, text_of

from mlx_vlm_prune.serving.time_budget import NOT_CALIBRATED, TimeBudgets  # isort: skip - needs FastAPI
from mlx_vlm_prune.serving.visual_budget import VisualBudget  # isort: skip

CHOSEN = "divprune+restore"  # on the built-in model, tests/test_auto.py
SCENE = compose(1_000_000_100).image()
COLOUR, COUNT = "What colour is the star?", "How many squares are there?"


@pytest.fixture(autouse=True)
def _no_real_cache(tmp_path, monkeypatch):
    """Calibrations of other tests would say what is gained."""
    monkeypatch.setenv("MLX_VLM_PRUNE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def scenes():
    return load(dtype="float32")


@pytest.fixture(scope="module")
def served(scenes):
    with serve(*scenes) as server:
        yield server


def test_a_budget_in_a_request_is_enough_and_its_usage_says_why(served, scenes):
    content = served.chat(question(COLOUR, SCENE), visual_tokens=22, max_tokens=4)
    alone = generate(*scenes, COLOUR, SCENE, pruner=CHOSEN, keep_tokens=22, max_tokens=4)
    usage = content["usage"]
    assert text_of(content) == alone.text and content["warnings"] == []
    assert (usage["pruner"], usage["visual_tokens_kept"]) == (CHOSEN, 22)
    assert usage["auto"].startswith(f"auto: {CHOSEN}: ") and "caution" not in usage["auto"]
    usage = served.chat(question(COUNT, SCENE), visual_tokens=22, max_tokens=1)["usage"]
    assert usage["visual_tokens_kept"] == 44 and usage["auto"].endswith("--no-caution keeps 22")


def test_detail_low_keeps_its_number_whatever_is_asked(served):
    usage = served.chat(question(COUNT, SCENE, detail="low"), max_tokens=1)["usage"]
    assert (usage["pruner"], usage["visual_tokens_kept"]) == (CHOSEN, 64)


def test_a_method_that_is_named_stays_and_without_a_budget_nothing_is_pruned(served):
    usage = served.chat(question(COUNT, SCENE), pruner="norm", visual_tokens=22, max_tokens=1)[
        "usage"
    ]
    assert (usage["pruner"], usage["visual_tokens_kept"], usage.get("auto")) == ("norm", 22, None)
    usage = served.chat(question(COUNT, SCENE), max_tokens=1)["usage"]
    assert (usage["pruner"], usage["visual_tokens_kept"]) == ("none", 196) and "auto" not in usage
    usage = served.chat(question(COLOUR, SCENE), pruner="auto", max_tokens=1)["usage"]
    assert (usage["pruner"], usage["visual_tokens_kept"]) == (CHOSEN, 98)


def test_a_servers_own_budget_is_enough_without_caution_too(scenes):
    with serve(*scenes, is_pruning=True, keep_ratio=0.25, caution=False) as server:
        usage = server.chat(question(COUNT, SCENE), max_tokens=1)["usage"]
        assert (usage["pruner"], usage["visual_tokens_kept"]) == (CHOSEN, 49)


def test_a_server_that_was_not_calibrated_chooses_nothing_by_time(served):
    content = served.chat(question(COLOUR, SCENE), pruner="auto", budget_ms=9.0, max_tokens=1)
    assert content["usage"]["pruner"] == "none" and "auto" not in content["usage"]
    assert content["warnings"] == [NOT_CALIBRATED.format("no method")]


def test_a_budget_of_time_that_no_number_meets_is_no_choice(scenes, monkeypatch):
    monkeypatch.setattr(TimeBudgets, "calibrate", lambda self, name: vars(self).update(method=name))
    monkeypatch.setattr(TimeBudgets, "choose", lambda *_: VisualBudget())
    with serve(*scenes, is_pruning=True, budget_ms=9.0) as server:
        usage = server.chat(question(COUNT, SCENE), max_tokens=1)["usage"]
    assert usage["pruner"] == "none" and "auto" not in usage


def test_a_budget_of_time_calibrates_the_method_that_is_chosen(scenes, monkeypatch):
    calibrated = []

    def calibrate(self, method):
        calibrated.append(method)
        self.method = method

    def choose(self, chat, prepared):
        return VisualBudget(chat.budget.pruner, keep_tokens=11)

    monkeypatch.setattr(TimeBudgets, "calibrate", calibrate)
    monkeypatch.setattr(TimeBudgets, "choose", choose)
    with serve(*scenes, is_pruning=True, budget_ms=9.0) as server:
        usage = server.chat(question(COUNT, SCENE), max_tokens=1)["usage"]
    assert calibrated == [CHOSEN]
    assert (usage["pruner"], usage["visual_tokens_kept"]) == (CHOSEN, 11)
    assert usage["auto"] == f"auto: {CHOSEN}: calibrated for budget_ms"


def test_the_app_chooses_and_notes_why(tmp_path):
    thread = ModelThread()
    opened = thread.run(partial(open_model, build_app_parser().parse_args([])), BUILT_IN)
    talk = Conversation(opened, thread, 4)
    SCENE.save(tmp_path / "a.png")
    for _ in talk.ask(COUNT, [str(tmp_path / "a.png")], TokenBudget("auto", 0.1)):
        pass
    result = talk.pruned.result
    assert result.pruner == CHOSEN and result.visual_tokens_kept == 19  # what the slider shows
    assert figures_line(result).endswith(f"; {result.auto}") and not talk.notes
    thread.close()
