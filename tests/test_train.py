"""Promises of the trainer: a step learns, a stopped run goes on, what it exports converts."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from convert.__main__ import main as convert
from mlx_vlm_prune import generate
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.hosts.loading import load
from mlx_vlm_prune.models.learned import read_learned
from mlx_vlm_prune.scenes import compose, pages
from mlx_vlm_prune.scenes.pages import Facts, Page, Text
from mlx_vlm_prune.scenes.vocabulary import large_words
from mlx_vlm_prune.scenes.vocabulary import write as write_words
from torch_ref.train_scenes import main as train_command
from torch_ref.training.recipes import ScenesRecipe
from torch_ref.training.scenes import Run, export, judge, train
from torch_ref.training.scenes_data import ScenesBatches
from torch_ref.training.scenes_model import SIZES, Trainee
from torch_ref.training.worlds import GLYPHS, IGNORE, LARGE, PageWorld, SceneWorld

CPU = torch.device("cpu")
TINY = ScenesRecipe(tower_steps=1, steps=3, warmup=1, batch=2, question_tokens=40)


@pytest.fixture(scope="module")
def built_in():
    """A model of the sizes that are trained here."""
    return load()[0]


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
    monkeypatch.setattr("torch_ref.training.scenes.best_device", lambda: CPU)
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


def test_another_size_or_batch_does_not_go_on_from_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr("torch_ref.training.scenes.best_device", lambda: CPU)
    Run(Trainee(0.5), TINY, CPU).save(tmp_path / "last.pt")
    for other in (replace(TINY, batch=3), replace(TINY, size="large")):
        with pytest.raises(UserError, match="of size small with 2 pictures a step"):
            train(tmp_path, other, minutes=9, workers=0)


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


def test_the_large_model_learns_both_worlds_and_converts(tmp_path):
    torch.manual_seed(0)
    run = Run(Trainee(0.5, SIZES["large"]), replace(TINY, size="large", tower_steps=0), CPU)
    batch = next(iter(ScenesBatches(2, 60, 0, LARGE, is_padded=True)))
    assert batch.pixels.shape == (2, 3, 384, 384) and batch.ids.shape[1] == 578 + 60
    assert {kind in pages.KINDS for kind in batch.kinds} == {True, False}
    figures = run.advance(batch.to(CPU))
    assert all(value == value for value in figures.values()) and "printed" in figures
    export(run.trainee.vlm, tmp_path)
    write_words(tmp_path / "words", large_words())
    target = tmp_path / "mlx"
    convert(["to-mlx", str(tmp_path / "scenes.pth"), str(target), "--vision",
             str(tmp_path / "clip"), "--tokenizer", str(tmp_path / "words")])  # fmt: skip
    size = sum(file.stat().st_size for file in target.iterdir())
    assert size < 40e6
    model, processor = load(target)
    picture = pages.draw(pages.compose(7))
    answer = generate(model, processor, "What is the total?", picture, max_tokens=3)
    assert answer.visual_tokens == 576


def test_patches_of_a_page_name_the_word_or_the_digits_that_are_printed_there():
    texts = (Text("Apple", 40, 104, 16), Text("74", 200, 104, 16), Text("390", 300, 40, 30, "lm"))
    ink = (0, 0, 0)
    page = Page(0, "table", "Roboto-Bold", (255, 255, 255), ink, 0.0, 0.0, texts, (), Facts())
    groups = list(LARGE.groups)
    targets = PageWorld().patch_targets(page, groups).reshape(24, 24, -1)

    def named(row: int, column: int) -> dict[str, str]:
        places = dict(zip(groups, targets[row, column], strict=True))
        return {g: LARGE.groups[g][place] for g, place in places.items() if place != IGNORE}

    assert named(6, 3) == {"cell": "a2", "printed": "apple"}
    assert named(6, 12) == {"cell": "c2", "digit": "7"}
    assert named(6, 13) == {"cell": "c2", "next digit": "##4"}
    assert named(2, 19) == {"cell": "d1", "digit": "3"}
    assert named(2, 20) == {"cell": "d1", "next digit": "##9"}
    assert named(12, 3) == {"cell": "a3", "kind": "nothing"}


def test_each_third_of_a_patch_of_a_page_names_the_letter_that_is_printed_there():
    texts = (Text("ABC", 32, 104, 24), Text("7", 208, 40, 24, "rm"))
    ink = (0, 0, 0)
    page = Page(0, "table", "DejaVuSansMono", (255, 255, 255), ink, 0.0, 0.0, texts, (), Facts())
    targets = PageWorld().glyphs(page).reshape(24, 24, 3)

    def letters(row: int, column: int) -> str:
        return "".join("." if n == IGNORE else GLYPHS[n] for n in targets[row, column])

    # A letter of this font is 14.45 pixels wide: a from 32 to 46.45, b to 60.9, c to 75.35.
    assert [letters(6, column) for column in (1, 2, 3, 4, 5)] == ["...", "aaa", "bbc", "cc.", "..."]
    assert letters(2, 12) == "777" and letters(2, 13) == "..."
    assert letters(5, 2) == letters(7, 2) == "..."  # above and below the line
    assert (targets >= 0).sum() == 11
    assert (SceneWorld().glyphs(compose(0)) == IGNORE).all()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What training leaves: a model, and a checkpoint of each training that is damaged."""
    folder = tmp_path_factory.mktemp("runs")
    export(Trainee(0.5).vlm, folder)
    (folder / "last.pt").write_bytes(b"cut off")
    return folder


MISTAKES = {
    "steps": (["--steps", "0"], "--steps: '0' is not a whole number from 1 on"),
    "minutes": (["--minutes", "nan"], "--minutes: 'nan' is not a number above 0"),
    "workers": (["--workers", "-1"], "--workers: '-1' is not a whole number"),
    "onto a file": (["--out", "{}/scenes.pth"], "scenes.pth: File exists"),
    "damaged": (["--out", "{}"], "last.pt is no checkpoint of this training"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_refused_in_one_sentence_and_leaves_nothing(
    folder, tmp_path, monkeypatch, capsys, case
):
    given, sentence = MISTAKES[case]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        train_command([argument.format(folder) for argument in given])
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert sentence in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("tensors", "part"),
    [
        ({"norm.weight": (3,)}, "belongs to no learned method"),
        ({"score_prune.fc1.weight": (64, 5)}, "score_prune.norm.weight is None, not"),
        ({"attention_pool.queries": (4, 9)}, r"queries is \(4, 9\), not \(4, 192\)"),
        ({"score_prune.more": (1,)}, "score_prune"),
    ],
)
def test_learned_weights_that_do_not_fit_are_refused(tmp_path, built_in, tensors, part):
    save_file(
        {k: torch.zeros(shape) for k, shape in tensors.items()}, tmp_path / "pruners.safetensors"
    )
    with pytest.raises(UserError, match=part):
        read_learned(tmp_path, built_in)
    (tmp_path / "pruners.safetensors").write_bytes(b"junk")
    with pytest.raises(UserError, match="no sound safetensors file"):
        read_learned(tmp_path, built_in)
