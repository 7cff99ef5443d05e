"""Promises of a checkpoint trained with a pool inside: its method and its K are the default."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from convert.__main__ import main as convert
from mlx_vlm_prune import Chat, batch_generate, generate, load
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.evaluate import main as evaluate
from mlx_vlm_prune.generate import main as generate_main
from mlx_vlm_prune.generation import running_batch, stream

from . import tiny

K, QUESTION = 5, "what is it ?"
NOTE = f"this checkpoint was trained with attention_pool, which keeps {K} visual tokens of an image"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """FOLDER/mlx, a model with a pool of 5 slots inside, and FOLDER/a.png."""
    folder = tmp_path_factory.mktemp("pool")
    pth, clip = tiny.publish(tiny.reference(), folder)
    tiny.write_words(folder / "words")
    state, width = torch.load(pth, weights_only=True), tiny.VISION.hidden_size
    torch.manual_seed(3)
    state["vision_proj.pool_queries"] = torch.randn(K, width)
    for x in "qkv":
        state[f"vision_proj.pool_{x}_proj.weight"] = torch.randn(width, width) / width**0.5
        state[f"vision_proj.pool_{x}_proj.bias"] = torch.zeros(width)
    torch.save(state, pth)
    words = ["--vision", str(clip), "--tokenizer", str(folder / "words")]
    convert(["to-mlx", str(pth), str(folder / "mlx"), *words])
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    return folder


@pytest.fixture
def model(home):
    stream._say_default.cache_clear()
    return load(home / "mlx")


def test_without_a_pruner_its_own_answers_and_it_is_said_once(home, model, caplog):
    image = home / "a.png"
    answers = [generate(*model, QUESTION, image, max_tokens=2) for _ in range(2)]
    answers += batch_generate(*model, [QUESTION], [image], max_tokens=2)
    answers += [Chat(*model, max_tokens=2).ask(QUESTION, image)]
    for answer in answers:
        assert (answer.pruner, answer.visual_tokens_kept) == ("attention_pool", K)
    assert [message.startswith(NOTE) for message in caplog.messages] == [True]
    named = generate(*model, QUESTION, image, pruner="attention_pool", max_tokens=2)
    assert named.token_ids == answers[0].token_ids


def test_none_keeps_all_and_nothing_is_said(home, model, caplog):
    answer = generate(*model, QUESTION, home / "a.png", pruner="none", max_tokens=2)
    assert (answer.pruner, answer.visual_tokens_kept) == ("none", tiny.N)
    assert not caplog.messages


def test_another_budget_than_the_trained_one_is_refused(home, model):
    with pytest.raises(UserError, match=f"was trained for {K} visual tokens; it cannot keep 8"):
        generate(*model, QUESTION, home / "a.png", keep_ratio=0.5)
    with pytest.raises(UserError, match=f"was trained for {K} visual tokens"):
        Chat(*model, keep_tokens=3)
    assert Chat(*model, keep_tokens=K).ask(QUESTION, home / "a.png").visual_tokens_kept == K


@pytest.mark.parametrize("budget", [{"visual_tokens": 8}, {"budget_ms": 5.0}, {}])
def test_a_server_keeps_the_trained_number_and_warns_of_another_or_strictly_refuses(
    home, model, budget, monkeypatch
):
    pytest.importorskip("uvicorn", reason="the server needs uvicorn")
    from .serving import question, serve

    message = question(QUESTION, Image.open(home / "a.png"))
    low = question(QUESTION, Image.open(home / "a.png"), detail="low")
    monkeypatch.setattr(running_batch, "low_detail_tokens", lambda N: 8)  # of more than there are
    with serve(*model, method="attention_pool", is_pruning=True) as server:
        assert server.chat(message, max_tokens=1)["warnings"] == []
        message = message if budget else low
        content = server.chat(message, max_tokens=1, **budget)
        (warning,) = content["warnings"]
        assert content["usage"]["visual_tokens_kept"] == K
        assert f"was trained for {K} visual tokens" in warning
        assert warning.endswith("; its own number was kept") and "keep_tokens" not in warning
        status, sentence = server.refusal(message, strict=True, **budget)
        assert (status, sentence) == (400, warning)


def test_generate_says_it_on_stderr_and_compares_with_all_tokens(home, model, capsys, tmp_path):
    command = ["--model", str(home / "mlx"), "-p", QUESTION, "--image", str(home / "a.png")]
    command += ["--max-tokens", "2", "--compare", "--json", str(tmp_path / "a.json")]
    generate_main(command)
    out, err = capsys.readouterr()
    assert err.startswith(f"note: {NOTE}, and that is the default; --pruner none keeps all\n")
    assert f"with {K} of {tiny.N} visual tokens" in out
    written = json.loads((tmp_path / "a.json").read_text())
    assert (written["pruner"], written["full"]["pruner"]) == ("attention_pool", "none")
    assert written["full"]["visual_tokens_kept"] == tiny.N


def test_a_model_without_one_still_refuses_a_comparison_of_nothing(home, capsys):
    with pytest.raises(SystemExit) as stop:
        generate_main(["-p", QUESTION, "--image", str(home / "a.png"), "--compare"])
    assert stop.value.code == 2 and "needs a budget or a --pruner" in capsys.readouterr().err


def test_evaluate_asks_it_with_its_own_k(home, model, capsys, tmp_path):
    line = {"image": str(home / "a.png"), "question": QUESTION, "answer": "yes"}
    (tmp_path / "q.jsonl").write_text(json.dumps(line) + "\n")
    command = ["--model", str(home / "mlx"), "--questions", str(tmp_path / "q.jsonl")]
    evaluate([*command, "--out", str(tmp_path / "e.json"), "--max-tokens", "2"])
    rows = json.loads((tmp_path / "e.json").read_text())["rows"]
    pairs = {(row["pruner"], row["tokens"]) for row in rows}
    assert pairs == {("none", tiny.N), ("random", K), ("attention_pool", K)}
    assert NOTE in capsys.readouterr().err
