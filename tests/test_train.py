"""Promises of the trainer: a step learns, a stopped run goes on, what it exports converts."""

import json

import torch

from convert.__main__ import main as convert
from mlx_vlm_prune.loading import load
from mlx_vlm_prune.scenes.vocabulary import write as write_words
from torch_ref.scenes_data import ScenesBatches
from torch_ref.scenes_model import Trainee
from torch_ref.train import Recipe, Run, export, judge, train

CPU = torch.device("cpu")
TINY = Recipe(tower_steps=1, steps=3, warmup=1, batch=2, question_tokens=40)


def test_a_step_of_either_stage_moves_every_weight_that_it_should(monkeypatch):
    torch.manual_seed(0)
    run = Run(Trainee(0.5), TINY, CPU)
    batches = iter(ScenesBatches(TINY.batch, TINY.question_tokens))
    for stage, moves in (("tower", "vision_encoder"), ("questions", "model.layers.0")):
        before = {name: p.detach().clone() for name, p in run.trainee.named_parameters()}
        figures = run.advance(next(batches).to(CPU))
        assert all(value == value for value in figures.values()), stage  # a number
        moved = {n for n, p in run.trainee.named_parameters() if not p.equal(before[n])}
        assert any(moves in name for name in moved), stage
    assert "answer" in figures


def test_a_stopped_training_goes_on_as_if_it_had_not_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr("torch_ref.train.best_device", lambda: CPU)
    train(tmp_path / "whole", TINY, minutes=9, workers=0)
    torch.manual_seed(0)
    torch.manual_seed(TINY.seed)
    run, batches = Run(Trainee(TINY.dense_weight), TINY, CPU), iter(ScenesBatches(2, 40))
    (tmp_path / "parts").mkdir()
    run.advance(next(batches).to(CPU))
    run.save(tmp_path / "parts" / "last.pt")
    train(tmp_path / "parts", TINY, minutes=9, workers=0)
    whole, parts = (torch.load(tmp_path / n / "scenes.pth") for n in ("whole", "parts"))
    assert all(whole[name].equal(parts[name]) for name in whole)
    assert json.loads((tmp_path / "parts" / "clip" / "config.json").read_text())["patch_size"] == 16


def test_what_training_exports_converts_and_loads(tmp_path):
    trainee = Trainee(0.5)
    export(trainee.vlm, tmp_path)
    write_words(tmp_path / "words")
    target = tmp_path / "mlx"
    vision, words = str(tmp_path / "clip"), str(tmp_path / "words")
    convert(["to-mlx", str(tmp_path / "scenes.pth"), str(target), "--vision", vision,
             "--tokenizer", words])  # fmt: skip
    model, _ = load(target)
    assert model.N == 196
    assert set(judge(trainee, CPU, 1)) == {
        "existence", "colour", "counting", "relation", "grounding", "reading",
    }  # fmt: skip
