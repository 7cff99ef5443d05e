"""Promises of stage `pruner` in mlx-vlm's models: scores learn, the model stays, and it is used."""

import json
import os
import shutil

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")

from mlx_vlm.utils import load as mlx_vlm_load

from mlx_vlm_prune import generate, load, pruned
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.evaluate import main as evaluate
from mlx_vlm_prune.fuse import main as fuse
from mlx_vlm_prune.hosts.families import host_of
from mlx_vlm_prune.hosts.prompt import encode_images, prepare_prompt
from mlx_vlm_prune.inputs.image import open_image
from mlx_vlm_prune.pruners import plan
from mlx_vlm_prune.training.host_pruner import _mask
from mlx_vlm_prune.training.processes import Processes
from mlx_vlm_prune.training.run import make_trainer, train

from .host_folders import desk
from .training_data import bits, config

KINDS = ["qwen2_5_vl", "smolvlm"]
BUDGET = {"pruner": "score_prune", "keep_ratio": 0.5}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny checkpoint of each kind, and four questions about two pictures."""
    folder = desk(tmp_path_factory.mktemp("hosts"), [*KINDS, "qwen3_vl"])
    lines = [
        {"image": f"{'ab'[i % 2]}.png", "question": "w7 w9", "answer": f"w{20 + i % 2}"}
        for i in range(4)
    ]
    for split in ("train", "valid"):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def run(place, kind, out, **keys):
    """A config for a run of a few steps."""
    values = {"model": str(place / kind), "dtype": "float32", "iters": 3, **BUDGET, **keys}
    return config("pruner", values.pop("data", place / "train.jsonl"), out, **values)


def learner_of(place, kind, out, **keys):
    return make_trainer(run(place, kind, out, **keys), Processes())


@pytest.mark.parametrize("kind", KINDS)
def test_the_pruner_alone_moves_and_is_used(place, tmp_path, kind):
    before = bits(load(place / kind, dtype="float32")[0])
    trainer = learner_of(place, kind, tmp_path / "none")
    first = bits(trainer.learner)
    trainer.run()
    moved = {name for name, x in bits(trainer.learner).items() if x != first[name]}
    assert moved == {name for name in first if name.startswith("pruners.score_prune.")}
    after = bits(trainer.learner.model)
    assert after == before

    source = {file.name: file.read_bytes() for file in (place / kind).iterdir()}
    train(run(place, kind, tmp_path / "a", data=str(place)))
    assert source == {file.name: file.read_bytes() for file in (place / kind).iterdir()}
    written = mx.load(str(tmp_path / "a/pruners.safetensors"))
    model, processor = load(tmp_path / "a", dtype="float32")
    weights = host_of(model, processor).learned["score_prune"]
    assert mx.array_equal(weights.fc1.weight, written["score_prune.fc1.weight"])
    assert mx.array_equal(weights.fc1.weight, trainer.learner.pruners["score_prune"].fc1.weight)
    assert bits(model) == before
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "a" / name).read_bytes() == source[name]
    assert os.path.samefile(place / kind / "model.safetensors", tmp_path / "a/model.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_where_all_tokens_stay_the_mask_changes_nothing(place, tmp_path, kind):
    trainer = learner_of(place, kind, tmp_path / "a", keep_ratio=1.0)
    batch, learner = trainer.data.batch(np.arange(4)), trainer.learner
    learner.begin_step(1, 3)
    under_mask = learner.loss(batch).item()
    learner.eval()
    assert under_mask == pytest.approx(learner.loss(batch).item(), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_reaches_every_layer_of_the_scores(place, tmp_path, kind):
    trainer = learner_of(place, kind, tmp_path / "a")
    batch = trainer.data.batch(np.arange(4))
    _, gradients = trainer.loss_and_gradients(batch)
    arrays = {name: np.array(array) for name, array in tree_flatten(gradients)}
    assert len(arrays) == 6 and all(np.isfinite(array).all() for array in arrays.values())
    assert np.abs(arrays["pruners.score_prune.norm.weight"]).max() > 0


def test_the_soft_loss_is_that_of_the_pruned_model(place, tmp_path):
    """In a model whose kept tokens keep their positions; others number them again."""
    learner = learner_of(place, "qwen2_5_vl", tmp_path / "a", noise=0.0)
    batch, learner = learner.data.batch(np.arange(4)), learner.learner
    learner.begin_step(1, 3)  # in which the budget is the user's
    soft = learner.loss(batch).item()
    learner.eval()
    assert soft == pytest.approx(learner.loss(batch).item(), rel=1e-4)
    learner.train()
    learner.begin_step(0, 3)  # and here half of it
    assert learner.loss(batch).item() != pytest.approx(soft, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_a_dropped_token_is_what_its_attention_would_change(place, tmp_path, kind):
    trainer = learner_of(place, kind, tmp_path / "a")
    learner, batch = trainer.learner, trainer.data.batch(np.arange(1))

    def loss_of(factor: mx.array) -> mx.array:  # of one token of the first view
        views = iter([factor])
        learner._factor = lambda view, K: mx.concatenate(
            [next(views, mx.ones(1)), mx.ones(view.signals.x_BND.shape[1] - 1)]
        )
        return learner.loss(batch)

    dropped, step = mx.array([1e-20]), 0.02
    gradient = mx.grad(loss_of)(dropped).item()
    difference = (loss_of(mx.array([step])) - loss_of(dropped)).item() / step
    assert gradient == pytest.approx(difference, rel=0.1) and abs(gradient) > 1e-3


def test_a_row_sees_itself_without_its_bias():
    inf = np.inf
    expected = [[0, -inf, -inf], [0, 0, -inf], [0, -5, 0]]
    np.testing.assert_array_equal(np.array(_mask(mx.array([0.0, -5, 0])))[0, 0], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_bit_for_bit(place, tmp_path, kind):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(run(place, kind, whole, iters=4))
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints/0000004")
    (parts / "pruners.safetensors").unlink()
    train(run(place, kind, parts, iters=4, resume=True))
    one, two = ((folder / "pruners.safetensors").read_bytes() for folder in (whole, parts))
    assert one == two


@pytest.fixture(scope="module")
def trained(place):
    """A folder that a run has left, of each kind."""
    for kind in KINDS:
        train(run(place, kind, place / f"trained-{kind}"))
    return place


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_in_uses_the_weights(trained, tmp_path, kind):
    folder = trained / f"trained-{kind}"
    model, processor = load(folder, dtype="float32")
    keys = {"image": trained / "b.png", "max_tokens": 2, **BUDGET}
    result = generate(model, processor, "w7 w9", **keys)
    host = host_of(model, processor)
    inputs = prepare_prompt(host, "w7 w9", [open_image(trained / "b.png")])
    views = encode_images(host, inputs, plan("none"))
    scores = [np.array(host.learned["score_prune"](view.signals)[0]) for view in views]
    starts = np.cumsum([0, *map(len, scores)])
    best = [
        start + np.sort(np.argsort(-score)[: len(score) // 2])
        for start, score in zip(starts, scores, strict=False)
    ]
    assert result.kept_indices == [np.concatenate(best).tolist()]
    with pruned(model, **BUDGET) as report:
        model.get_input_embeddings(
            mx.array([inputs.ids]), inputs.pixels, mask=inputs.mask_1L, **inputs.extra
        )
    assert report.prompts[0].kept_indices == result.kept_indices
    questions = trained / "questions.jsonl"
    line = {"image": "b.png", "question": "w7", "answer": "w20"}
    questions.write_text(json.dumps(line))
    evaluate([
        "--model", str(folder), "--questions", str(questions), "--out", str(tmp_path / "e.json"),
        "--keep-ratio", "0.5", "--max-tokens", "2",
    ])  # fmt: skip
    rows = json.loads((tmp_path / "e.json").read_text())["rows"]
    assert "score_prune" in {row["pruner"] for row in rows}


@pytest.mark.parametrize("kind", KINDS)
def test_mlx_vlm_reads_the_folder_as_it_reads_the_base(trained, kind):
    base, ours = (bits(mlx_vlm_load(str(trained / n))[0]) for n in (kind, f"trained-{kind}"))
    assert base == ours


def test_a_second_run_begins_with_the_weights_of_the_first(trained, tmp_path):
    first = trained / "trained-smolvlm"
    learner = learner_of(trained, "trained-smolvlm", tmp_path / "a").learner
    stored = mx.load(str(first / "pruners.safetensors"))
    assert mx.array_equal(
        learner.pruners["score_prune"].fc2.weight, stored["score_prune.fc2.weight"]
    )
    assert learner.starts == {"score_prune": False}
    again, untrained = (
        learner_of(trained, kind, tmp_path / "a", reset_pruner=is_reset).learner
        for kind, is_reset in (("trained-smolvlm", True), ("smolvlm", False))
    )
    assert again.starts == untrained.starts == {"score_prune": True}
    assert bits(again) == bits(untrained)
    train(run(trained, "trained-smolvlm", tmp_path / "b", save_every=1))
    metrics = (tmp_path / "b/metrics.jsonl").read_text()
    assert metrics != (first / "metrics.jsonl").read_text()
    assert not (tmp_path / "b/checkpoints/0000000").exists()
    assert json.loads((tmp_path / "b/run.json").read_text())["model"] == str(first)


def test_adapters_learn_behind_it_and_fuse_beside_it(trained, tmp_path):
    source = trained / "trained-qwen2_5_vl"
    values = {"model": str(source), "dtype": "float32", **BUDGET}
    train(config("lora", trained / "train.jsonl", tmp_path / "a", **values))
    adapters = ["--adapter-path", str(tmp_path / "a"), "--save-path", str(tmp_path / "f")]
    fuse(["--model", str(source), *adapters])
    one, two = ((f / "pruners.safetensors").read_bytes() for f in (source, tmp_path / "f"))
    assert one == two
    model, processor = load(tmp_path / "f", dtype="float32")
    keys = {"image": trained / "a.png", "max_tokens": 2, **BUDGET}
    assert generate(model, processor, "w7", **keys).pruner == "score_prune"


REFUSALS = {
    "pruner divprune does not learn in a model of mlx-vlm's; attention_pool, score_prune, mlp": {
        "pruner": "divprune"
    },
    "pruner score_prune[+]divprune does not learn": {"pruner": "score_prune+divprune"},
    "no pruner learns in a qwen3_vl model of mlx-vlm's: training would read the rows without": {
        "kind": "qwen3_vl"
    },
    "in dtype bfloat16 or float32": {"dtype": "float16"},
    "lies inside the model's own folder": {"inside": True},
    "without grad_checkpoint": {"grad_checkpoint": True},
    "freeze and unfreeze are for models of ours": {"unfreeze": ["projector"]},
}


@pytest.mark.parametrize("fault", REFUSALS)
def test_what_cannot_be_trained_is_refused_in_one_sentence(place, tmp_path, fault):
    keys = dict(REFUSALS[fault])
    kind = keys.pop("kind", "smolvlm")
    out = place / kind / "out" if keys.pop("inside", False) else tmp_path / "x"
    with pytest.raises(UserError, match=fault):
        learner_of(place, kind, out, **keys)


def test_weights_that_do_not_fit_are_refused(trained, tmp_path):
    shutil.copytree(trained / "trained-smolvlm", tmp_path / "a")
    file = tmp_path / "a/pruners.safetensors"
    weights = mx.load(str(file))
    weights["score_prune.norm.weight"] = mx.zeros(7)
    mx.save_safetensors(str(file), weights)
    model, processor = load(tmp_path / "a", dtype="float32")
    with pytest.raises(UserError, match=r"score_prune.norm.weight is \(7,\)"):
        generate(model, processor, "w7", image=trained / "a.png", **BUDGET)
