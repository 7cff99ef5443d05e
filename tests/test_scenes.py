"""Promises of the built-in world: its pictures, its questions, and the model that ships with it."""

import json

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_prune import load
from mlx_vlm_prune.evaluation.answers import (
    QuestionBatch,
    answer_batch,
    prepare_question,
    share_tower,
)
from mlx_vlm_prune.evaluation.questions.scenes import read_drawn, score
from mlx_vlm_prune.generate import SAMPLE_SEED, main
from mlx_vlm_prune.pruners import METHODS, plan
from mlx_vlm_prune.scenes import HELD_OUT_SEEDS, KINDS, TRAIN_SEEDS, Scene, compose, question_set
from mlx_vlm_prune.scenes.draw import CELL
from mlx_vlm_prune.scenes.vocabulary import UNKNOWN, tokenizer, words
from torch_ref.training.scenes_data import ScenesBatches


@pytest.fixture(scope="module")
def held_out():
    return list(question_set(HELD_OUT_SEEDS, 40))


@pytest.fixture(scope="module")
def built_in():
    return load()


def test_a_seed_draws_the_same_picture_every_time_and_another_seed_another():
    first, again, other = (np.asarray(compose(seed).image()) for seed in (5, 5, 6))
    assert (first == again).all()
    assert (first != other).any()


def test_every_thing_lies_inside_its_own_cell():
    for seed in range(200):
        scene = compose(seed)
        cells = [thing.cell for thing in scene.things] + list(
            scene.sign.cells if scene.sign else ()
        )
        assert len(set(cells)) == len(cells)
        for thing in scene.things:
            column, row = "abcd".index(thing.cell[0]), "1234".index(thing.cell[1])
            for centre, place in ((thing.x, column), (thing.y, row)):
                assert place * CELL <= centre - thing.radius
                assert centre + thing.radius <= (place + 1) * CELL


def truth(scene: Scene, kind: str, text: str) -> str:
    """The answer, found from the scene by other means than the generator's."""
    words = text.lower().rstrip("?.").split()
    if kind == "existence":
        return "yes" if any({t.colour, t.shape} <= set(words) for t in scene.things) else "no"
    if kind == "colour":
        return next(t.colour for t in scene.things if t.shape == words[-1])
    if kind == "counting":
        of = " ".join(words[2:-2])
        return str(
            sum(
                of in ("shapes", f"{t.colour} shapes", f"{t.shape}s", f"{t.shape}es")
                for t in scene.things
            )
        )
    if kind == "grounding":
        return next(t.cell for t in scene.things if t.colour in words and t.shape in words)
    if kind == "relation":
        first, second = (
            next(t for t in scene.things if f"{t.colour} {t.shape}" in part)
            for part in text.split(" or ")[0:2]
        )
        if "above" in words:
            return "above" if first.y < second.y else "below"
        return "left" if first.x < second.x else "right"
    assert scene.sign is not None
    return scene.sign.text.lower()


def test_every_question_has_the_answer_that_the_scene_gives(held_out):
    for scene, questions in held_out:
        for question in questions:
            assert question.answer == truth(scene, question.kind, question.text), question


def test_every_question_and_answer_is_made_of_known_words(held_out):
    speaks = tokenizer()
    unknown = words().index(UNKNOWN)
    for _, questions in held_out:
        for question in questions:
            ids = speaks.encode(question.text, add_special_tokens=False).ids
            answer = speaks.encode(question.answer, add_special_tokens=False).ids
            assert unknown not in ids + answer
            assert speaks.decode(answer) == question.answer


def test_what_is_judged_on_is_never_trained_on(held_out):
    assert not set(TRAIN_SEEDS[-1:]) & set(HELD_OUT_SEEDS[:1])
    assert all(scene.seed in HELD_OUT_SEEDS for scene, _ in held_out)
    data = ScenesBatches(batch=32, question_tokens=64)
    assert data.seeds(7000)[-1] in TRAIN_SEEDS
    with pytest.raises(AssertionError):
        data.seeds(len(TRAIN_SEEDS) // 32 + 1)


# Three have no eye for what is small and of one colour, or leave before the words have read:
# benchmarks/results/scenes.json has their figures. ipcv keeps what changes most in the tower, and
# in this one that is the background (docs/log.md).
WEAK = ("v2drop", "vtw", "pact", "ipcv")
CHOOSING = [n for n, m in METHODS.items() if not m.learned]
ABLE = [n for n in CHOOSING if n not in ("none", "restore", "ivc", *WEAK)]


class Quiz:
    """Questions, as many of each kind, whose pictures the tower reads once for all methods that
    work behind it."""

    def __init__(self, built_in, specs: list[str], per_kind: int):
        model, self.processor = built_in
        self.model, tower = share_tower(model, [plan(spec) for spec in specs])
        self.questions, self.per_kind = list(read_drawn(per_kind)), per_kind
        prepared = [prepare_question(model, self.processor, q) for q in self.questions]
        self.batch = QuestionBatch(model, prepared)
        tower.start(self.batch)

    def accuracy(self, spec: str, K: int) -> dict[str, float]:
        """The share of right answers of each kind."""
        tokenizer, right = self.processor.tokenizer, dict.fromkeys(KINDS, 0.0)
        ends = tokenizer.eos_token_ids
        answers = answer_batch(self.model, self.batch, plan(spec), K, ends, max_tokens=8)
        for question, ids in zip(self.questions, answers.ids, strict=True):
            right[question.kind] += score(question, tokenizer.decode(ids)) / self.per_kind
        return right


def test_the_built_in_model_answers_held_out_questions_of_every_kind(built_in):
    figures = Quiz(built_in, ["none"], per_kind=12).accuracy("none", 196)
    assert set(figures) == set(KINDS)
    assert min(figures.values()) > 0.9, figures


@pytest.fixture(scope="module")
def quiz(built_in):
    return Quiz(built_in, ABLE, per_kind=2)


@pytest.mark.parametrize("name", ABLE)
def test_no_method_at_half_the_tokens_makes_the_model_talk_nonsense(quiz, name):
    figures = quiz.accuracy(name, 98)
    assert sum(figures.values()) / len(figures) > 0.25, figures


def test_the_demo_answers_rightly_with_all_tokens_and_with_half(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["--json", "told.json"])
    sign = compose(SAMPLE_SEED).sign
    assert sign
    figures = json.loads((tmp_path / "told.json").read_text())
    assert figures["full"]["text"] == figures["text"] == sign.text.lower()
    assert (figures["visual_tokens"], figures["visual_tokens_kept"]) == (196, 98)
    assert (tmp_path / "sample-kept.png").stat().st_size > 10_000
    assert "Visual tokens: 196 -> 98 (50.0% pruned)" in capsys.readouterr().out


def test_the_built_in_weights_are_finite(built_in):
    model, _ = built_in
    pixels = mx.array(np.random.default_rng(0).normal(size=(1, 224, 224, 3)).astype(np.float32))
    assert mx.isfinite(model.tower(pixels).signals.x_BND).all().item()
