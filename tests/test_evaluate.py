"""Promises of the evaluation: the same figures every time, each method beside full and random."""

import json

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_vlm_prune import generate, load
from mlx_vlm_prune.evaluate import main
from mlx_vlm_prune.evaluation import asking
from mlx_vlm_prune.evaluation.answers import Batch, answer, ready
from mlx_vlm_prune.evaluation.bootstrap import interval, resampled
from mlx_vlm_prune.pruners import plan
from mlx_vlm_prune.questions import Question

from . import tiny

QUESTIONS = ("Is there a red star?", "What colour is the star?", "Where is the blue heart?")
TIMES = ("seconds", "machine", "versions")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A random tiny model, and six questions about two pictures."""
    folder = tmp_path_factory.mktemp("home")
    tiny.checkpoint(tiny.reference(), folder)
    rng = np.random.default_rng(0)
    lines = []
    for name in ("a.png", "b.png"):
        Image.fromarray(rng.integers(0, 255, (80, 90, 3), dtype=np.uint8)).save(folder / name)
        lines += [{"image": name, "question": q, "answer": "yes"} for q in QUESTIONS]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture(autouse=True)
def _no_real_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_VLM_PRUNE_CACHE", str(tmp_path / "cache"))


def evaluated(home, out, *more: str, pruners=("norm", "fastv:layer=1")) -> dict:
    """What a run with 12 of 16 tokens writes, without times."""
    named = [part for name in pruners for part in ("--pruner", name)]
    asked = ["--questions", str(home / "questions.jsonl"), "--model", str(home / "mlx")]
    main([*asked, *named, "--keep-tokens", "12", "--batch", "2", "--out", str(out), *more])
    told = json.loads(out.read_text())
    return {key: value for key, value in told.items() if key not in TIMES}


def test_two_runs_give_the_same_file_but_for_times(home, tmp_path):
    first = evaluated(home, tmp_path / "a.json")
    assert first == evaluated(home, tmp_path / "b.json")
    assert [row["pruner"] for row in first["rows"]] == ["none", "random", "norm", "fastv:layer=1"]
    assert first["rows"][0]["loyalty"] == 1
    assert not list(tmp_path.glob("*.part.jsonl"))


def test_an_interrupted_run_goes_on_and_ends_in_the_same_file(home, tmp_path, monkeypatch, capsys):
    whole = evaluated(home, tmp_path / "whole.json")
    asked, real = [], asking.answer

    def interrupting(*told):
        asked.append(told)
        if len(asked) == 6:  # in the second batch of two questions, with four methods each
            raise KeyboardInterrupt
        return real(*told)

    monkeypatch.setattr(asking, "answer", interrupting)
    with pytest.raises(SystemExit) as stop:
        evaluated(home, tmp_path / "cut.json")
    assert stop.value.code == 130
    assert "2 of 6 questions are answered" in capsys.readouterr().err
    assert not (tmp_path / "cut.json").exists()
    asked.clear()
    asked += [None] * 6
    assert evaluated(home, tmp_path / "cut.json") == whole
    assert len(asked) - 6 == 2 * 4  # two batches were left
    assert "going on after 2 of 6 questions" in capsys.readouterr().err


def test_all_tokens_kept_is_full_whatever_the_method(home, tmp_path):
    told = evaluated(home, tmp_path / "a.json", "--keep-tokens", "16", pruners=("norm", "tome"))
    full = told["rows"][0]
    for row in (row for row in told["rows"] if row["tokens"] == 16):
        for name in ("accuracy", "overall", "loyalty", "logprob"):
            assert row[name] == full[name]
        assert set(map(tuple, row["to_full"].values())) == {(0, 0, 0)}


def test_answers_are_those_of_generate_and_likelihoods_those_of_a_recomputation(home):
    model, processor = load(home / "mlx")
    asked = [Question(q, q, ("red star",), home / "a.png") for q in QUESTIONS]
    batch = Batch(model, [ready(model, processor, q) for q in asked])
    ends = processor.tokenizer.eos_token_ids
    for spec in ("none", "norm", "avgpool", "fastv:layer=1"):
        K = 16 if spec == "none" else 12
        said = answer(model, batch, plan(spec), K, ends, 5)
        for b, q in enumerate(asked):
            budget = {} if spec == "none" else {"keep_tokens": K}
            options = {"pruner": spec, "max_tokens": 5, **budget}
            alone = generate(model, processor, q.text, image=home / "a.png", **options)
            assert said.ids[b] == alone.token_ids
        if spec in ("none", "norm"):  # without a cache: the answer is part of the prompt
            assert said.logprob_B[0] == pytest.approx(recomputed(model, batch, spec, K), abs=1e-4)


def recomputed(model, batch, spec: str, K: int) -> float:
    """The first right answer's log-probability from one pass over prompt and answer."""
    right = [int(token) for token in batch.right_BA[0] if token >= 0]
    row = type(batch.rows[0])([*batch.rows[0].ids, *right], batch.rows[0].runs)
    done = model([row], batch.pixels_IHW3[:1], plan(spec), K, last_only=False)
    logits_LV = done.logits_BLV[0, -len(right) - 1 : -1]
    told_LV = logits_LV - mx.logsumexp(logits_LV, axis=-1, keepdims=True)
    return sum(told_LV[i, token].item() for i, token in enumerate(right))


def test_a_damaged_image_is_an_error_or_named_and_left_out(home, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n")
    lines = [json.loads(line) for line in (home / "questions.jsonl").read_text().splitlines()]
    for line in lines:
        line["image"] = str(home / line["image"])
    lines.insert(1, {**lines[0], "image": str(tmp_path / "broken.png"), "id": "torn"})
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\nno json")
    (tmp_path / "mlx").symlink_to(home / "mlx")
    with pytest.raises(SystemExit) as stop:
        evaluated(tmp_path, tmp_path / "a.json", pruners=("norm",))
    assert stop.value.code == 2
    assert "line 8" in capsys.readouterr().err
    told = evaluated(tmp_path, tmp_path / "a.json", "--skip-bad", pruners=("norm",))
    assert told["count"] == 6
    assert len(told["skipped"]) == 2 and "torn" in " ".join(told["skipped"])


def test_ninety_five_percent_intervals_cover_the_truth_in_ninety_to_ninety_nine():
    rng, hits, trials, G = np.random.default_rng(1), 0, 300, 150
    for trial in range(trials):
        easy_G = rng.random(G)  # what both methods share, so that they are paired
        ours_G = (easy_G < 0.8) ^ (rng.random(G) < 0.05)
        theirs_G = (easy_G < 0.7) ^ (rng.random(G) < 0.05)
        sums_GM = np.stack([ours_G, theirs_G], axis=1)
        drawn_RM = resampled(sums_GM, np.ones(G), rng=np.random.default_rng(trial), resamples=400)
        apart = float(ours_G.mean() - theirs_G.mean())
        _, low, high = interval(apart, drawn_RM[:, 0] - drawn_RM[:, 1])
        hits += low <= 0.9 * (0.8 - 0.7) <= high
    assert 0.90 <= hits / trials <= 0.99
