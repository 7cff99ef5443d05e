"""A deeper model grows from the built-in one, begins near its answers, and converts."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from convert.__main__ import main as convert
from mlx_vlm_prune import UserError, generate
from mlx_vlm_prune.hosts.loading import load
from mlx_vlm_prune.scenes import CHECKPOINT, HELD_OUT_SEEDS, KINDS, pages, question_set
from mlx_vlm_prune.scenes.vocabulary import write as write_words
from torch_ref.models.loading import load_folder
from torch_ref.train_scenes import main as train_command
from torch_ref.training.recipes import RECIPES
from torch_ref.training.scenes import judge, train
from torch_ref.training.scenes_data import ScenesBatches, judge_batches
from torch_ref.training.scenes_model import SIZES, ModelSize, Trainee, check_can_grow, grow
from torch_ref.training.worlds import IGNORE, PAGES, SMALL

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def built_in():
    return load_folder(CHECKPOINT, CPU)[0]


def of_depth(layers: int) -> ModelSize:
    return replace(SIZES["deep"], text=replace(SIZES["deep"].text, num_hidden_layers=layers))


def grown(built_in, layers: int):
    trainee = Trainee(0.5, of_depth(layers))
    grow(trainee.vlm, built_in)
    return trainee


def test_as_deep_as_the_built_in_model_it_is_that_model(built_in):
    state = grown(built_in, 4).vlm.state_dict()
    assert all(value.equal(state[name]) for name, value in built_in.state_dict().items())


def test_what_the_parts_of_a_layer_add_is_what_the_layer_added(built_in):
    deep, shallow = grown(built_in, 12).vlm.state_dict(), built_in.state_dict()
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        parts = [deep[f"model.layers.{layer}.{name}.weight"] for layer in (3, 4, 5)]
        torch.testing.assert_close(sum(parts), shallow[f"model.layers.1.{name}.weight"])
    for layer in (9, 10, 11):
        query = deep[f"model.layers.{layer}.self_attn.q_proj.weight"]
        assert query.equal(shallow["model.layers.3.self_attn.q_proj.weight"])


def test_new_words_follow_those_of_the_smaller_model(built_in):
    trainee = Trainee(0.5, SIZES["pages"])
    before = trainee.vlm.language.embed_tokens.weight.clone()
    grow(trainee.vlm, built_in)
    after, old = trainee.vlm.language.embed_tokens.weight, built_in.language.embed_tokens.weight
    assert after[: len(old)].equal(old) and after[len(old) :].equal(before[len(old) :])
    assert PAGES.tokens[: len(old)] == SMALL.tokens and len(after) == len(PAGES.tokens) > len(old)


def test_letters_teach_a_tower_that_learns_and_no_other():
    trainee, batch = Trainee(0.5, SIZES["pages"]), next(iter(ScenesBatches(4, 40, 0, PAGES)))
    batch = batch.to(CPU)
    loss, figures = trainee(batch, questions=False)
    loss.backward()
    assert "glyph" in figures and trainee.vlm.tower.embeddings.patch_embedding.weight.grad.any()
    without = replace(batch, glyphs=torch.full_like(batch.glyphs, IGNORE))
    assert trainee(without, questions=False)[1]["glyph"] == 0
    trainee.vlm.tower.requires_grad_(False)
    assert "glyph" not in trainee(batch, questions=False)[1]
    assert Trainee(0.5, SIZES["deep"]).glyphs is None


def test_one_picture_in_four_of_the_model_of_pages_is_a_scene():
    batch = next(iter(ScenesBatches(8, 60, 0, PAGES)))
    assert batch.pixels.shape == (8, 3, 224, 224)
    drawn = [type(PAGES.world(seed)).__name__ for seed in range(8)]
    assert drawn == ["SceneWorld", "PageWorld", "PageWorld", "PageWorld"] * 2
    kinds = {kind for batch in judge_batches(2, 16, PAGES) for kind in batch.kinds}
    assert kinds == {*KINDS, *pages.KINDS}


def test_the_deep_model_of_pages_needs_the_one_that_it_grows_from(capsys):
    for argv in (["--size", "pages-deep"], ["--size", "deep", "--model", "somewhere"]):
        with pytest.raises(SystemExit) as stop:
            train_command(argv)
        assert stop.value.code == 2
        assert "--model belongs to --size pages-deep, which needs it" in capsys.readouterr().err


def test_a_model_that_another_cannot_grow_from_is_refused(built_in):
    words = SMALL.ids
    other_words = {**words, "star": 0}
    for size, known, sentence in (
        (SIZES["large"], words, "has other sizes"),
        (of_depth(6), words, "has 4 layers, which cannot become 6"),
        (SIZES["pages"], other_words, "has other words"),
    ):
        with pytest.raises(UserError, match=f"^here {sentence}"):
            check_can_grow(Trainee(0.5, size).vlm, built_in, known, PAGES.ids, Path("here"))
    check_can_grow(Trainee(0.5, SIZES["pages-deep"]).vlm, built_in, words, PAGES.ids, Path("here"))


def test_steps_of_a_tower_that_stays_are_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        train_command(["--size", "deep", "--tower-steps", "5"])
    assert stop.value.code == 2
    assert "--tower-steps must be 0: the tower of deep" in capsys.readouterr().err


def test_it_begins_near_the_answers_that_it_grew_from(built_in):
    right = judge(grown(built_in, 12), CPU, 5)
    chance = judge(Trainee(0.5, SIZES["deep"]), CPU, 5)
    assert sum(right.values()) > 2 * sum(chance.values()) + 1


def test_training_moves_its_layers_and_leaves_the_tower(tmp_path, built_in, monkeypatch):
    monkeypatch.setattr("torch_ref.training.scenes.best_device", lambda: CPU)
    recipe = replace(RECIPES["deep"], steps=1, warmup=1, batch=2, question_tokens=40)
    train(tmp_path, recipe, minutes=9, workers=0)
    trained = torch.load(tmp_path / "last.pt", weights_only=True)["model"]
    start = grown(built_in, 12).vlm.state_dict()
    for name, value in start.items():
        if name.startswith("vision_encoder."):
            assert value.equal(trained[f"vlm.{name}"]), name
        elif ".layers." in name and name.endswith("proj.weight"):
            assert not value.equal(trained[f"vlm.{name}"]), name
    write_words(tmp_path / "words")
    convert(["to-mlx", str(tmp_path / "scenes.pth"), str(tmp_path / "mlx"), "--vision",
             str(tmp_path / "clip"), "--tokenizer", str(tmp_path / "words")])  # fmt: skip
    model, _ = load(tmp_path / "mlx")
    assert len(model.language.layers) == 12


def test_the_trained_one_answers_also_where_a_method_drops_between_its_layers():
    model, processor = load("scenes-deep")
    cases = [(s.image(), q) for s, some in question_set(HELD_OUT_SEEDS, 2) for q in some]
    assert len(model.language.layers) == 12 and {q.kind for _, q in cases} == {*KINDS}
    for options in ({}, {"pruner": "fastv", "keep_tokens": 49}):
        answers = [
            generate(model, processor, q.text, picture, max_tokens=5, **options).text
            for picture, q in cases
        ]
        assert answers == [q.answer for _, q in cases]


def test_a_compiled_tower_trains_as_the_plain_one(tmp_path, monkeypatch):
    """Here without the code that a compiler writes, which is the same for every user of torch."""
    calls, compiled = [], torch.nn.Module.compile

    def traced(module: torch.nn.Module) -> None:
        calls.append(type(module).__name__)
        compiled(module, backend="eager")

    monkeypatch.setattr("torch_ref.training.scenes.best_device", lambda: CPU)
    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    recipe = replace(RECIPES["pages"], tower_steps=2, steps=2, warmup=1, batch=2)
    states = []
    for name, is_compiled in (("plain", False), ("compiled", True)):
        train(tmp_path / name, recipe, minutes=9, workers=0, is_compiled=is_compiled)
        states.append(torch.load(tmp_path / name / "last.pt", weights_only=True)["model"])
    plain, other = states
    assert calls == ["VisionTower"] and plain.keys() == other.keys()
    for name, value in plain.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=1e-4, msg=name)
