"""Promises of the app's conversations: both answers are `generate`'s, and mistakes change nothing.

Shapes: N visual tokens of an image.
"""

import gc
import weakref
from itertools import zip_longest

import pytest
from PIL import Image

from mlx_vlm_prune import Chat, generate
from mlx_vlm_prune.app import open_folder
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.generation.photographs import SCENES_ONLY
from mlx_vlm_prune.scenes import CHECKPOINT, compose
from mlx_vlm_prune.webui.conversations import (
    HOSTS_HAVE_NO_MS,
    Conversation,
    TokenBudget,
    figures_line,
    overlay_of,
)
from mlx_vlm_prune.webui.model_thread import BUILT_IN, Models, ModelThread

N, SEED = 196, 1_000_000_007
FIRST, SECOND = "What does the sign say?", "Is there a red star?"
QUARTER, HALF = TokenBudget("divprune", 0.25), TokenBudget("divprune", 0.5)


@pytest.fixture(scope="module")
def thread():
    return ModelThread()


@pytest.fixture(scope="module")
def opened(thread):
    return thread.run(open_folder, BUILT_IN)


@pytest.fixture
def talk(thread, opened):
    return Conversation(opened, thread, 8)


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    file = tmp_path_factory.mktemp("scenes") / "scene.png"
    compose(SEED).image().save(file)
    return str(file)


@pytest.fixture
def answer(thread, opened, scene):
    """What `generate` answers about the scene."""

    def ask(question: str, **options):
        model, processor = opened.model, opened.processor
        return thread.run(
            lambda: generate(model, processor, question, scene, max_tokens=8, **options)
        )

    return ask


def test_both_answers_are_those_of_generate(talk, scene, answer):
    texts = [dict(talk.text) for _ in talk.ask(FIRST, [scene], QUARTER)]
    full, pruned = answer(FIRST), answer(FIRST, pruner="divprune", keep_ratio=0.25)
    assert texts[-1] == {"full": full.text, "pruned": pruned.text}
    assert talk.full.result.kept_indices == full.kept_indices == [[*range(N)]]
    assert talk.pruned.result.kept_indices == pruned.kept_indices
    question = {"role": "user", "content": f"{FIRST}\n(with 1 picture)"}
    for name, result in (("full", full), ("pruned", pruned)):
        reply = {"role": "assistant", "content": result.text or "(empty)"}
        assert talk.messages(name) == [question, reply]
    line = figures_line(talk.pruned.result)
    assert line.startswith("49 of 196 visual tokens (25%); ") and "first token " in line
    assert overlay_of(talk.pruned.result).tobytes() == pruned.overlay().tobytes()


def test_while_an_answer_is_written_both_chats_show_the_question(talk, scene):
    writing = talk.ask(FIRST, [scene], QUARTER)
    next(writing)
    assert [m["content"] for m in talk.messages("full")] == [FIRST, "…"]
    assert talk.messages("pruned")[0]["content"] == FIRST
    assert [len(talk.messages(name)) for _ in writing for name in ("full", "pruned")][-2:] == [2, 2]


def test_a_second_question_is_answered_as_in_a_chat(talk, thread, opened, scene):
    chat = Chat(opened.model, opened.processor, pruner="divprune", keep_ratio=0.25, max_tokens=8)
    for question, files in ((FIRST, [scene]), (SECOND, [])):
        for _ in talk.ask(question, files, QUARTER):
            pass
        expected = thread.run(chat.ask, question, files)
        assert talk.pruned.result.text == expected.text
        assert talk.pruned.result.kept_indices == expected.kept_indices
    assert [turn.question for turn in talk.full.turns] == [FIRST, SECOND]


def test_another_budget_answers_the_latest_question_anew(talk, scene, answer):
    for _ in talk.ask(FIRST, [scene], QUARTER):
        pass
    full = talk.full.result
    for _ in talk.ask_again(HALF):
        pass
    again = answer(FIRST, pruner="divprune", keep_ratio=0.5)
    assert talk.pruned.result.kept_indices == again.kept_indices
    assert [turn.answer for turn in talk.pruned.turns] == [again.text]
    assert talk.full.result is full and len(talk.pruned.images) == 1
    for _ in talk.ask_again(TokenBudget("none")):
        pass
    assert talk.pruned.result.kept_indices == full.kept_indices
    fresh = Conversation(talk.opened, talk.thread, 8)
    assert [*fresh.ask_again(HALF)] == [] and not fresh.pruned.turns


def test_a_mistake_is_a_sentence_and_changes_nothing(talk, scene, tmp_path, monkeypatch):
    broken = tmp_path / "my cat.png"
    broken.write_bytes(b"no picture")
    for _ in talk.ask(FIRST, [scene], QUARTER):
        pass
    before = [(talk.messages(name), getattr(talk, name).result) for name in ("full", "pruned")]
    with pytest.raises(UserError, match=r"^my cat.png is not a PNG, .* image$"):
        [*talk.ask(SECOND, [str(broken)], QUARTER)]
    with pytest.raises(UserError, match="no pruner is called 'nrom'"):
        [*talk.ask(SECOND, [scene], TokenBudget("nrom", 0.5))]
    with pytest.raises(UserError):
        [*talk.ask_again(TokenBudget("fastv", 0.02))]  # fewer than the first layers hold
    refused = talk.full.stream

    def refuse(*arguments):
        raise UserError("the prompt is too long")
        yield

    monkeypatch.setattr(talk.full, "stream", refuse)  # behind the pruned answer
    with pytest.raises(UserError, match="too long"):
        [*talk.ask(SECOND, [], QUARTER)]
    monkeypatch.setattr(talk.full, "stream", refused)
    after = [(talk.messages(name), getattr(talk, name).result) for name in ("full", "pruned")]
    assert after == before
    for _ in talk.ask(SECOND, [], QUARTER):
        pass
    assert len(talk.pruned.turns) == len(talk.full.turns) == 2


def test_an_answer_that_nobody_reads_to_its_end_is_no_turn(talk, thread, scene):
    writing = talk.ask(FIRST, [scene], QUARTER)
    next(writing)
    writing.close()
    thread.run(gc.collect)  # behind what was to be put back
    assert not talk.messages("full") and not talk.messages("pruned")
    for _ in talk.ask(SECOND, [scene], QUARTER):
        pass
    assert len(talk.pruned.turns) == len(talk.pruned.images) == 1


def test_two_conversations_at_once_get_what_they_get_alone(thread, opened, scene):
    questions = ((FIRST, QUARTER), (SECOND, HALF))
    alone = []
    for question, budget in questions:
        one = Conversation(opened, thread, 8)
        [*one.ask(question, [scene], budget)]
        alone.append((one.messages("full"), one.messages("pruned")))
    talks = [Conversation(opened, thread, 8) for _ in questions]
    answers = (t.ask(q, [scene], b) for t, (q, b) in zip(talks, questions, strict=True))
    assert [*zip_longest(*answers)]
    assert [(t.messages("full"), t.messages("pruned")) for t in talks] == alone


def test_milliseconds_choose_the_number_of_tokens(talk, scene, tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_VLM_PRUNE_CALIBRATION_SECONDS", "0.1")
    monkeypatch.setenv("MLX_VLM_PRUNE_CACHE", str(tmp_path))
    [*talk.ask(FIRST, [scene], TokenBudget("divprune", ms=1e6))]
    assert talk.notes.startswith("Budget: 1e+06 ms -> 196 of 196 visual tokens, predicted median")
    [*talk.ask_again(TokenBudget("divprune", ms=1e-3))]
    assert "cannot meet 0.001 ms" in talk.notes
    [*talk.ask_again(QUARTER)]
    assert not talk.notes


def test_the_built_in_model_says_that_it_knows_no_photographs(talk, tmp_path):
    Image.new("RGB", (300, 200), (9, 99, 9)).save(tmp_path / "photo.jpg")
    [*talk.ask(FIRST, [str(tmp_path / "photo.jpg")], QUARTER)]
    assert talk.notes == SCENES_ONLY


def test_without_a_picture_nothing_is_pruned(talk):
    [*talk.ask(FIRST, [], QUARTER)]
    assert overlay_of(talk.pruned.result) is None
    assert "visual tokens" not in figures_line(talk.pruned.result)
    assert talk.pruned.result.text == talk.full.result.text


def test_the_menu_has_what_the_model_can_do(opened):
    assert opened.methods[0] == "none" and {"divprune", "fastv", "duet"} <= {*opened.methods}
    assert "twig" in opened.methods  # whose weights it has
    assert "restore" not in opened.methods  # which goes with another


def test_models_are_shared_and_given_up(thread, opened, tmp_path):
    models = Models(thread, opened, open_folder)
    assert models.open(f" {BUILT_IN} ") is opened
    for name, sentence in (
        ("nowhere", "there is no folder nowhere"), ("", "give the folder of a model"),
        (str(tmp_path), "is no checkpoint"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=sentence) as mistake:
            models.open(name)
        assert "\n" not in str(mistake.value)
    another = models.open(str(CHECKPOINT))
    assert models.open(str(CHECKPOINT)) is another is not opened
    gone = weakref.ref(another)
    del another
    gc.collect()
    assert gone() is None


def test_models_of_mlx_vlm_are_asked_too_but_not_by_milliseconds(thread, tmp_path):
    pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")
    from . import host_folders

    desk = host_folders.desk(tmp_path, ["llava"])
    opened = thread.run(open_folder, str(desk / "llava"))
    talk = Conversation(opened, thread, 3)
    [*talk.ask("w1 w2", [str(desk / "a.png")], QUARTER)]
    result = talk.pruned.result
    assert "divprune" in opened.methods and "twig" not in opened.methods
    assert 4 * result.visual_tokens_kept == result.visual_tokens
    with pytest.raises(UserError, match="in milliseconds") as refusal:
        [*talk.ask_again(TokenBudget("divprune", ms=100))]
    assert str(refusal.value) == HOSTS_HAVE_NO_MS and len(talk.pruned.turns) == 1
