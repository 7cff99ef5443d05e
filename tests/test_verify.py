"""Promises of `torch_ref.verify`: 0 where models agree, 1 where they do not, 2 for a mistake."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import torch_ref.pruners as ref
from convert.__main__ import main as convert
from mlx_vlm_prune.scenes import CHECKPOINT, compose
from torch_ref.generation.parity import Comparison, Difference, Error, apart
from torch_ref.generation.verification import EVERY
from torch_ref.verify import main

from . import backbones, generations, llava, tiny
from .test_full_size import publish

SIDE = 64


def verify(*arguments: object) -> int:
    """The exit code."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return stop.value.code


def results(file) -> dict[str, dict]:
    """The rows of a file by method."""
    return {row["pruner"]: row for row in json.loads(file.read_text())["rows"]}


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A MiniMind2-V as published, its folder for MLX with weights of learned methods, a picture."""
    folder = tmp_path_factory.mktemp("verify")
    tiny.checkpoint(tiny.taught(tiny.reference()), folder)
    compose(0).image().resize((SIDE, SIDE)).save(folder / "photo.png")
    return folder


@pytest.fixture
def pair(desk):
    """The arguments of a comparison: source, folder, tower, image, budget."""
    return [
        desk / "published.pth", desk / "mlx", "--vision", desk / "clip",
        "--image", desk / "photo.png", "--keep-ratio", 0.6, "--prompt", "Is there a red star?",
    ]  # fmt: skip


def test_every_method_agrees_on_a_minimind_and_the_file_has_versions_and_machine(
    desk, pair, capfd, tmp_path
):
    file = tmp_path / "verify.json"
    assert verify(*pair, "--json", file) == 0
    content, rows = json.loads(file.read_text()), results(file)
    refused = {row["pruner"]: row["refused"] for row in content["refused"]}
    assert set(refused) == {"attention_pool"} and "holds no weights" in refused["attention_pool"]
    assert [*rows] == [name for name in EVERY if name not in refused]
    assert all(row["verdict"] == "agrees" and not row["kept_apart"] for row in rows.values())
    assert rows["norm"]["K"] == 9 and rows["none"]["K"] == 16
    assert 0 < rows["norm"]["logit_error"] < 1e-5 and rows["norm"]["tokens"] > 1
    assert content["versions"]["torch"] == torch.__version__ and content["versions"]["mlx"]
    assert content["machine"]["cores"] and content["verdicts"] == {"agrees": len(rows)}
    out, _ = capfd.readouterr()
    assert f"{len(rows)} of {len(rows)} methods agree" in out
    line = next(line for line in out.splitlines() if line.startswith("norm "))
    assert line.split()[1:5] == ["9", "of", "16", "0"]


def test_several_images_and_a_chain(desk, pair, capfd):
    more = ["--image", desk / "photo.png", "--prompt", "is there # and", "--max-tokens", 4]
    chains = ["--pruner", "visionzip+fastv", "--pruner", "tome+divprune"]
    assert verify(*pair, *more, *chains) == 0
    assert "2 of 2 methods agree" in capfd.readouterr().out


def test_one_changed_weight_is_found(desk, pair, capfd, tmp_path):
    shutil.copytree(desk / "mlx", tmp_path / "mlx")
    file = tmp_path / "mlx" / "model.safetensors"
    weights = load_file(file)
    weights["language.layers.1.mlp.up_proj.weight"][3, 5] += 0.5
    save_file(weights, file, metadata={"format": "mlx"})
    pair[1], report = tmp_path / "mlx", tmp_path / "verify.json"
    assert verify(*pair, "--pruner", "norm", "--json", report) == 1
    row = results(report)["norm"]
    assert row["feature_error_of_tolerance"] <= 1 < row["logit_error_of_tolerance"]
    assert row["kept_apart"] == 0 and row["verdict"] == "apart"
    assert "0 of 1 methods agree" in capfd.readouterr().out


def test_a_broken_twin_is_found(pair, monkeypatch, tmp_path, capfd):
    def lowest(score, K):
        return ref.numerics.keep_highest(-score, K)

    monkeypatch.setattr("torch_ref.pruners.norm.keep_highest", lowest)
    report = tmp_path / "verify.json"
    assert verify(*pair, "--pruner", "norm", "--pruner", "uniform", "--json", report) == 1
    rows = results(report)
    assert (
        rows["norm"]["kept_apart"] == 14 and rows["uniform"]["verdict"] == "agrees"
    )  # 9 and 9 of 16: 2 shared


@pytest.mark.parametrize("kind", ["vicuna", "phi"])
def test_a_llava_agrees_with_what_transformers_saved(kind, tmp_path, capfd):
    if kind == "phi":
        backbones.write("phi", tmp_path / "hf")
    else:
        llava.write(llava.random_model(kind), tmp_path / "hf")
    convert(["to-mlx", str(tmp_path / "hf"), str(tmp_path / "mlx")])
    compose(0).image().resize((SIDE, SIDE)).save(tmp_path / "photo.png")
    chosen = "none norm cls_attention divprune tome v2drop downsample".split()
    names = [argument for name in chosen for argument in ("--pruner", name)]
    image = ["--image", tmp_path / "photo.png", "--keep-ratio", 0.6]
    assert verify(tmp_path / "hf", tmp_path / "mlx", *image, *names) == 0
    assert f"{len(chosen)} of {len(chosen)} methods agree" in capfd.readouterr().out


@pytest.mark.parametrize("name", ["minimind2-v-2025-02-moe", "minimind-3v-2026-03"])
def test_another_generation_agrees(name, tmp_path, capfd):
    """Neighbours rotated and experts; patches that merge, where the tower's methods are refused."""
    generations.release(*generations.CASES[generations.NAMES.index(name)]).write(tmp_path)
    source, target, tower = (tmp_path / part for part in ("published.pth", "mlx", "tower"))
    paths = [str(source), str(target), "--vision", str(tower)]
    convert(["to-mlx", *paths, "--tokenizer", str(tmp_path / "words")])
    compose(0).image().resize((SIDE, SIDE)).save(tmp_path / "photo.png")
    names = ["--pruner", "none", "--pruner", "divprune", "--pruner", "holov"]
    image = ["--image", tmp_path / "photo.png"]
    assert verify(source, target, "--vision", tower, *image, *names) == 0
    assert "3 of 3 methods agree" in capfd.readouterr().out


def test_without_a_model_the_built_in_one_agrees_with_itself_about_a_drawn_scene(capfd):
    names = ["--pruner", "attention_pool", "twig", "--pruner", "cdpruner"]
    assert verify(*names, "--prompt", "What does the sign say?") == 0
    out, _ = capfd.readouterr()
    assert "3 of 3 methods agree" in out
    assert next(line for line in out.splitlines() if "attention_pool" in line).split()[4] == "–"


def test_a_source_alone_is_refused(capfd):
    assert verify("a.pth") == 2
    assert "error: MLX_FOLDER is missing: give a.pth and the folder" in capfd.readouterr().err


def test_a_minimind_of_full_layout_agrees(tmp_path, capfd, shared_data):
    _, pth, clip = publish(tmp_path)
    target, words = tmp_path / "mlx", shared_data / "minimind2"
    convert(["to-mlx", str(pth), str(target), "--vision", str(clip), "--tokenizer", str(words)])
    image = shared_data / "images" / "dance.jpg"
    names = ["none", "visionzip", "fastv", "vispruner"]
    some = [argument for name in names for argument in ("--pruner", name)]
    report = ["--max-tokens", 6, "--json", tmp_path / "r.json"]
    assert verify(pth, target, "--vision", clip, "--image", image, *some, *report) == 0
    *others, vispruner = results(tmp_path / "r.json").values()
    assert all(row["verdict"] == "agrees" for row in others)
    assert vispruner["verdict"] in ("agrees", "near-tie")  # its cosines are close to one


def mistakes(desk, tmp_path):
    """Arguments that are changed, and how the sentence begins."""
    convert(["to-mlx", str(desk / "mlx"), str(tmp_path / "q8"), "-q", "--q-bits", "8",
             "--q-group-size", "32"])  # fmt: skip
    (tmp_path / "host").mkdir()
    (tmp_path / "host" / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    text = tmp_path / "text.png"
    text.write_text("no picture")
    return [
        ({0: tmp_path / "nothing.pth"}, [], "there is no "),
        ({1: tmp_path / "nothing"}, [], "there is no "),
        ({1: tmp_path / "host"}, [], f"{tmp_path / 'host'}"),
        ({5: text}, [], f"{text}"),
        ({}, ["--pruner", "nrom"], "no pruner is called 'nrom'"),
        ({}, ["--pruner", "attention_pool"], "attention_pool is learned, and this checkpoint"),
        ({}, ["--keep-ratio", "2"], "--keep-ratio is 2.0; "),
        ({1: tmp_path / "q8"}, [], f"{tmp_path / 'q8'} is quantized"),
        ({1: CHECKPOINT}, ["--pruner", "norm"], "the two hold different models"),
        ({}, ["--json", tmp_path], f"{tmp_path}"),
        ({}, ["--max-tokens", "0"], "argument --max-tokens: "),
        ({}, ["--device", "cuda"], "--device is 'cuda'"),
    ]


def test_a_mistake_is_one_sentence_and_exit_code_2(desk, pair, tmp_path, capfd):
    cases = mistakes(desk, tmp_path)
    if torch.cuda.is_available():
        cases.pop()
    capfd.readouterr()
    for changed, more, start in cases:
        arguments = [changed.get(i, argument) for i, argument in enumerate(pair)]
        assert verify(*arguments, *more) == 2, start
        out, err = capfd.readouterr()
        sentences = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(sentences) == 1 and start in sentences[0] and not out, (start, err)


def test_ctrl_c_is_told_and_writes_nothing(pair, monkeypatch, tmp_path, capfd):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("torch_ref.generation.verification.compare", interrupted)
    assert verify(*pair, "--pruner", "norm", "--json", tmp_path / "verify.json") == 130
    assert not [*tmp_path.iterdir()]
    assert capfd.readouterr().err.endswith("\ninterrupted: nothing is written\n")


def test_an_error_by_hand():
    ours, theirs = torch.tensor([100.0, 1.0, 0.0]), torch.tensor([100.0, 1.0, 0.02])
    error = Error.between(ours, theirs)
    assert error.of_largest == pytest.approx(2e-4, rel=1e-3)
    assert error.of_tolerance == pytest.approx(2.0, rel=1e-3)  # 1e-4 of 100 are allowed there
    assert not error.is_within and Error.between(ours, ours).is_within
    at_the_largest = Error.between(ours, torch.tensor([100.01, 1.0, 0.0]))
    assert at_the_largest.of_tolerance == pytest.approx(0.5, rel=1e-2)  # and of itself as much
    assert not Error.between(ours, torch.tensor([100.0, 1.0, float("nan")])).is_within


def test_a_near_tie_by_hand():
    none = Error(0.0, 0.0)
    noise = [Difference(4, Error(0.5, 5e3), Error(0.1, 1e3)), Difference(0, none, none)]
    near = Difference(8, Error(1.0, 1e4), Error(0.2, 2e3))
    assert near.is_explained_by(noise) and not near.is_within
    assert Comparison("a", 9, near, 5, 2, True).verdict == "near-tie"
    for farther in (
        replace(near, kept_apart=9),
        replace(near, features=Error(1.1, 1e4)),
        replace(near, logits=Error(float("inf"), float("inf"))),
    ):
        assert not farther.is_explained_by(noise)
    within = Difference(0, Error(1e-6, 0.1), Error(1e-6, 0.1))
    assert within.is_explained_by(noise[1:]) and Comparison("a", 9, within, 5, 5).agrees
    assert Comparison("a", 9, within, 5, 4).verdict == "apart"


def test_equal_scores_are_a_near_tie(desk, pair, monkeypatch, tmp_path, capfd):
    """A selector that asks the last bits alone."""

    def last_bits(signals, K):
        score_BN = (1e8 * signals.x_BND.double().sum(dim=2)).sin()
        return ref.Reduction(ref.numerics.keep_highest(score_BN, K))

    monkeypatch.setattr("torch_ref.pruners.norm.prune", last_bits)
    report = tmp_path / "verify.json"
    assert verify(*pair, "--pruner", "norm", "--json", report) == 0
    assert results(report)["norm"]["verdict"] == "near-tie"
    assert "near-tie (1)" in capfd.readouterr().out


def test_tokens_apart_by_hand():
    ours = [(0, [[0, 1, 2]]), (2, [[0, 1]])]
    assert apart(ours, [[0, [[0, 1, 2]]], [2, [[0, 1]]]]) == 0
    assert apart(ours, [[0, [[0, 1, 3]]], [2, [[0, 1]]]]) == 2
    assert apart(ours, [[0, [[0, 1, 2]]]]) == 2  # the cut is missing
    assert apart([(0, [None])], [[0, [None]]]) is None
