"""Promises of the app's conversations: both answers are `generate`'s, and mistakes change nothing.

Shapes: N visual tokens of an image.
"""

import gc
from functools import partial
from itertools import zip_longest

import pytest
from PIL import Image

from mlx_vlm_prune import Chat, generate
from mlx_vlm_prune.app import open_model
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.generation.arguments import build_app_parser
from mlx_vlm_prune.generation.photographs import SCENES_ONLY
from mlx_vlm_prune.models.towers.vit import VisionTower
from mlx_vlm_prune.planning import host_budgets
from mlx_vlm_prune.scenes import compose
from mlx_vlm_prune.webui import BUILT_IN
from mlx_vlm_prune.webui.conversations import (
    Conversation,
    TokenBudget,
    figures_line,
    overlay_of,
)
from mlx_vlm_prune.webui.model_thread import ModelThread

from . import calibrations

N, SEED = 196, 1_000_000_007
FIRST, SECOND = "What does the sign say?", "Is there a red star?"
QUARTER, HALF = TokenBudget("divprune", 0.25), TokenBudget("divprune", 0.5)
read = partial(open_model, build_app_parser().parse_args([]))


@pytest.fixture(scope="module")
def thread():
    return ModelThread()


@pytest.fixture(scope="module")
def opened(thread):
    return thread.run(read, BUILT_IN)


@pytest.fixture
def talk(thread, opened):
    return Conversation(opened, thread, 8)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """The files of two scenes."""
    folder = tmp_path_factory.mktemp("scenes")
    files = [str(folder / f"{number}.png") for number in range(2)]
    for number, file in enumerate(files):
        compose(SEED + number).image().save(file)
    return files


@pytest.fixture(scope="module")
def scene(scenes):
    return scenes[0]


@pytest.fixture(scope="module")
def host_desk(tmp_path_factory):
    """A small model of mlx-vlm's, and two pictures."""
    pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")
    from . import host_folders

    return host_folders.desk(tmp_path_factory.mktemp("hosts"), ["llava"])


@pytest.fixture
def answer(thread, opened, scene):
    """What `generate` answers about the scene, or another one."""

    def ask(question: str, file: str = scene, **options):
        model, processor = opened.model, opened.processor
        return thread.run(
            lambda: generate(model, processor, question, file, max_tokens=8, **options)
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


def test_another_budget_answers_the_latest_question_anew(talk, scene, answer, monkeypatch):
    for _ in talk.ask(FIRST, [scene], QUARTER):
        pass
    full, encode, encoded = talk.full.result, VisionTower.__call__, list[int]()
    monkeypatch.setattr(VisionTower, "__call__", lambda *a: encoded.append(1) or encode(*a))
    for _ in talk.ask_again(HALF):
        pass
    again = answer(FIRST, pruner="divprune", keep_ratio=0.5)
    assert talk.pruned.result.kept_indices == again.kept_indices
    assert [turn.answer for turn in talk.pruned.turns] == [again.text]
    assert talk.full.result is full and len(talk.pruned.images) == 1
    for _ in talk.ask_again(TokenBudget("none")):
        pass
    assert talk.pruned.result.kept_indices == full.kept_indices
    assert len(encoded) == 1  # by `generate` alone
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


def test_a_stopped_answer_is_no_turn_and_the_conversation_goes_on(talk, scene):
    [*talk.ask(FIRST, [scene], QUARTER)]
    before = {name: talk.messages(name) for name in ("full", "pruned")}
    talk.stop()  # where nothing is being answered
    for writing in (talk.ask(SECOND, [], QUARTER), talk.ask_again(QUARTER)):
        next(writing)
        talk.stop()
        with pytest.raises(UserError, match=r"^stopped: "):
            list(writing)
        assert {name: talk.messages(name) for name in before} == before
    [*talk.ask(SECOND, [], QUARTER)]
    assert len(talk.messages("full")) == len(talk.messages("pruned")) == 4


def test_an_answer_that_nobody_reads_to_its_end_is_no_turn(talk, thread, scene):
    writing = talk.ask(FIRST, [scene], QUARTER)
    next(writing)
    writing.close()
    thread.run(gc.collect)  # behind what was to be put back
    assert not talk.messages("full") and not talk.messages("pruned")
    for _ in talk.ask(SECOND, [scene], QUARTER):
        pass
    assert len(talk.pruned.turns) == len(talk.pruned.images) == 1


@pytest.mark.parametrize("end", ["left", "left in the full answer", "the full answer fails"])
@pytest.mark.parametrize("is_first", [True, False])
def test_a_picture_behind_an_answer_that_is_no_turn_is_the_one_that_is_read(
    talk, thread, scenes, answer, monkeypatch, end, is_first
):
    scene, other = scenes
    if not is_first:
        [*talk.ask(SECOND, [scene], QUARTER)]
    before = len(talk.pruned.turns)
    if end == "the full answer fails":
        stream = talk.full.stream
        monkeypatch.setattr(talk.full, "stream", failing)
        with pytest.raises(RuntimeError, match="out of memory"):
            [*talk.ask(FIRST, [scene], QUARTER)]
        monkeypatch.setattr(talk.full, "stream", stream)
    else:
        writing = talk.ask(FIRST, [scene], QUARTER)
        next(writing)
        while end != "left" and not talk.text["full"]:
            next(writing)
        writing.close()
    thread.run(gc.collect)  # behind what was to be put back
    assert len(talk.pruned.turns) == len(talk.full.turns) == before
    [*talk.ask(FIRST, [other], QUARTER)]
    assert len(talk.pruned.images) == len(talk.full.images) == before + 1
    for chat, options in ((talk.full, {}), (talk.pruned, {"pruner": QUARTER.pruner})):
        keep = {"keep_ratio": QUARTER.keep_ratio} if options else {}
        expected = answer(FIRST, other, **options, **keep)
        assert chat.result.views[-1][0].tobytes() == expected.views[0][0].tobytes()
        assert chat.result.kept_indices[-1:] == expected.kept_indices
        if is_first:
            assert chat.result.text == expected.text


def failing(*arguments):
    """An answer that breaks off at once."""
    raise RuntimeError("out of memory")
    yield


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


def test_models_of_mlx_vlm_are_asked_too(thread, host_desk):
    opened = thread.run(read, str(host_desk / "llava"))
    talk = Conversation(opened, thread, 3)
    [*talk.ask("w1 w2", [str(host_desk / "a.png")], QUARTER)]
    result = talk.pruned.result
    assert "divprune" in opened.methods and "twig" not in opened.methods
    assert 4 * result.visual_tokens_kept == result.visual_tokens


def test_milliseconds_choose_tokens_of_models_of_mlx_vlm_behind_the_turns_so_far(
    thread, host_desk, tmp_path, monkeypatch
):
    """Where a row takes a second, K is what is left of the seconds by the rows of words."""
    from .test_host_budgets import slow_machine

    calibrations.isolate(monkeypatch, tmp_path / "cache")
    monkeypatch.setattr(host_budgets, "measure", lambda p, _: slow_machine(p.pipeline.spec))
    monkeypatch.setattr(host_budgets, "measure_level", lambda *_: 1.0)
    talk = Conversation(thread.run(read, str(host_desk / "llava")), thread, 3)
    words = []
    for question, files in (("w1 w2", [str(host_desk / "a.png")]), ("w7 w8 w9", [])):
        [*talk.ask(question, files, TokenBudget("divprune", ms=1e9))]
        everything = talk.pruned.result
        assert everything.visual_tokens_kept == everything.visual_tokens == 16
        words.append(everything.prompt_tokens - 16)
        [*talk.ask_again(TokenBudget("divprune", ms=1000 * (words[-1] + 5) + 900))]
        assert talk.pruned.result.visual_tokens_kept == 5
        assert talk.notes.startswith("Budget: ") and " -> 5 of 16 visual tokens" in talk.notes
    assert words[1] > words[0] + 3  # those of the turn before are among them
    [*talk.ask_again(TokenBudget("divprune", ms=1e-3))]
    assert "cannot meet 0.001 ms" in talk.notes and len(talk.pruned.turns) == 2
