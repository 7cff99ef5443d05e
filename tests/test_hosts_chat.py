"""Promises of a chat with mlx-vlm's models: each turn is what reading all turns again gives, by the
chat template of the model, and the tower runs once for the images of a prompt."""

import pytest

from mlx_vlm_prune import Chat, load
from mlx_vlm_prune.chat import Session
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.generation.request import Request
from mlx_vlm_prune.hosts import stream
from mlx_vlm_prune.hosts.families import FAMILIES, host_of
from mlx_vlm_prune.hosts.prompt import prepare_prompt
from mlx_vlm_prune.inputs.messages import Turn

from . import host_folders

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own
NAMES = ["llava", "qwen2_5_vl", "qwen3_vl"]
TURNS = [("w7 w9", "a.png"), ("w3", None), ("w4 w8", "b.png"), ("w11", None)]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return host_folders.desk(tmp_path_factory.mktemp("hosts"), NAMES)


@pytest.fixture(scope="module")
def loaded(home):
    return {name: load(home / name) for name in NAMES}


@pytest.mark.parametrize("pruner", ["none", "cdpruner", "vispruner", "fastv"])
@pytest.mark.parametrize("name", NAMES)
def test_every_turn_is_what_reading_all_turns_from_scratch_gives(name, pruner, home, loaded):
    options = {"pruner": pruner, "keep_ratio": 1 if pruner == "none" else 0.5, "max_tokens": 4}
    model, processor = loaded[name]
    chat = Chat(model, processor, **options)
    for question, image in TURNS:
        history = tuple(chat.turns)
        answer = chat.ask(question, image and home / image)
        request = Request(question, chat.images, history=history, **options)
        *_, whole = stream.stream_generate(model, processor, request)
        assert (answer.token_ids, answer.text) == (whole.result.token_ids, whole.result.text)
        assert answer.kept_indices == whole.result.kept_indices
        assert chat.rows_reused == 0
    assert len(answer.kept_indices) == 2


@pytest.mark.parametrize("name", NAMES[1:])
def test_unpruned_a_turn_is_what_mlx_vlm_answers_to_the_same_messages(name, home, loaded):
    from mlx_vlm import generate as stock

    model, processor = loaded[name]
    chat = Chat(model, processor, max_tokens=4)
    for question, image in TURNS:
        answer = chat.ask(question, image and home / image)
    mark = host_folders.MARKS[host_folders._kind(name)]
    text = ""
    for (question, image), turn in zip(TURNS, chat.turns, strict=True):
        text += f"{mark if image else ''} {question}"
        text += f" {turn.answer.strip()}" if turn is not chat.turns[-1] else ""
    expected = stock(
        model, processor, text + " w5", [str(home / "a.png"), str(home / "b.png")], max_tokens=4,
        temperature=0.0,
    )  # fmt: skip
    assert answer.text == expected.text


def test_the_tower_runs_once_for_the_images_of_a_prompt(home, loaded, monkeypatch):
    calls, kind = [], FAMILIES["qwen2_5_vl"]
    run = kind.encode_images
    monkeypatch.setattr(kind, "encode_images", lambda *a: calls.append(1) or run(*a))
    chat = Chat(*loaded["qwen2_5_vl"], pruner="cdpruner", keep_ratio=0.5, max_tokens=2)
    for question, image in TURNS[:2]:
        chat.ask(question, image and home / image)
    chat.configure(keep_ratio=0.25)
    chat.ask("w3")
    assert len(calls) == 1
    for question, image in TURNS[2:]:
        chat.ask(question, image and home / image)
    assert len(calls) == 2
    chat.configure(pruner="received_attention")
    chat.ask("w3")
    assert len(calls) == 3


def test_a_model_that_reads_one_question_says_so(loaded, monkeypatch):
    model, processor = loaded["llava"]
    host = host_of(model, processor)
    monkeypatch.setattr(model.config, "model_type", "paligemma")
    with pytest.raises(UserError, match="a paligemma model reads one question and no earlier"):
        prepare_prompt(host, "w3", [], history=[Turn("w4", 0, "w5")])


def test_bad_lines_are_a_sentence_each_and_the_chat_goes_on(home, loaded, capsys):
    model, processor = loaded["llava"]
    chat = Chat(model, processor, max_tokens=3)
    lines = ["/pruner downsample", "/pruner none", "/keep 0.5", "<image> w3",
             f"/image {home / 'a.png'}", "w7", "/pruner norm", "/keep 0.25", "w9",
             "/stats"]  # fmt: skip
    Session(chat, processor).run(lines)
    out, err = capsys.readouterr()
    starts = ["error: downsample cannot prune a llava model", "error: a budget needs a pruner",
              "error: leave <image> out of the prompt"]  # fmt: skip
    assert len(err.splitlines()) == 3
    assert all(map(str.startswith, err.splitlines(), starts)) and "Visual tokens: 16 -> 4" in out
