"""Every learned method in mlx-vlm's models: trained, saved, resumed, and used as it was trained."""

import json
import shutil
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")

from mlx_vlm_prune import generate, load
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.hosts.families import host_of
from mlx_vlm_prune.hosts.prompt import encode_images_and_text, prepare_prompt
from mlx_vlm_prune.inputs.image import open_image
from mlx_vlm_prune.pruners import METHODS, plan
from mlx_vlm_prune.training.processes import Processes
from mlx_vlm_prune.training.run import make_trainer, train

from .host_folders import desk
from .training_data import bits, config

CASES = [
    ("llava", "score_prune"), ("llava", "mlp"),
    ("qwen2_5_vl", "mlp"), ("qwen2_5_vl", "attention_pool"), ("smolvlm", "mlp"),
]  # fmt: skip
K = 3


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny checkpoint of each kind, and four questions about two pictures."""
    folder = desk(tmp_path_factory.mktemp("hosts"), ["llava", "qwen2_5_vl", "smolvlm"])
    lines = [
        {"image": f"{'ab'[i % 2]}.png", "question": "w7 w9", "answer": f"w{20 + i % 2}"}
        for i in range(4)
    ]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def run(place, kind, pruner, out, **keys):
    """A config for a run of a few steps."""
    budget = {"keep_tokens": K} if pruner == "attention_pool" else {"keep_ratio": 0.5}
    values = {"model": str(place / kind), "dtype": "float32", "iters": 3, "pruner": pruner}
    return config("pruner", place / "train.jsonl", out, **{**values, **budget, **keys})


@pytest.mark.parametrize(("kind", "pruner"), CASES)
def test_the_weights_of_the_method_alone_move_and_every_one_of_them(place, tmp_path, kind, pruner):
    trainer = make_trainer(run(place, kind, pruner, tmp_path / "a"), Processes())
    first = bits(trainer.learner)
    _, gradients = trainer.loss_and_gradients(trainer.data.batch(np.arange(4)))
    arrays = {name: np.array(array) for name, array in tree_flatten(gradients)}
    assert arrays and all(np.isfinite(array).all() for array in arrays.values())
    trainer.run()
    last = bits(trainer.learner)
    moved = {name for name in last if last[name] != first[name]}
    learned = {name for name in last if name.startswith(f"pruners.{pruner}.")}
    assert moved <= learned and len(moved) >= len(learned) - 1  # a bias of keys moves no softmax


@pytest.mark.parametrize(("kind", "pruner"), CASES)
def test_the_folder_of_a_run_is_used_as_it_was_trained(place, tmp_path, kind, pruner):
    train(run(place, kind, pruner, tmp_path / "a"))
    written = mx.load(str(tmp_path / "a/pruners.safetensors"))
    assert all(name.startswith(f"{pruner}.") for name in written)
    model, processor = load(tmp_path / "a", dtype="float32")
    host = host_of(model, processor)
    pipeline = plan(pruner, host.learned)
    inputs = prepare_prompt(host, "w7 w9", [open_image(place / "b.png")])
    views = encode_images_and_text(host, inputs, pipeline)
    N = sum(view.signals.x_BND.shape[1] for view in views)
    budget = {"keep_tokens": K} if pruner == "attention_pool" else {"keep_ratio": 0.5}
    answer = generate(model, processor, "w7 w9", place / "b.png", pruner=pruner, max_tokens=2,
                      **budget)  # fmt: skip
    kept = K if pruner == "attention_pool" else N // 2
    assert (answer.visual_tokens, answer.visual_tokens_kept) == (N, kept)
    if pruner != "attention_pool" and len(views) == 1:
        score_N = np.array(host.learned[pruner](views[0].signals)[0])
        assert answer.kept_indices == [np.sort(np.argsort(-score_N)[:kept]).tolist()]
    if pruner == "attention_pool":
        with pytest.raises(UserError, match=f"was trained for {K} visual tokens; it cannot keep 2"):
            generate(model, processor, "w7", place / "b.png", pruner=pruner, keep_tokens=2)


@pytest.mark.parametrize(("kind", "pruner"), [("llava", "mlp"), ("qwen2_5_vl", "attention_pool")])
def test_a_run_goes_on_bit_for_bit_with_what_the_loss_moves(place, tmp_path, kind, pruner):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(run(place, kind, pruner, whole, iters=4))
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints/0000004")
    (parts / "pruners.safetensors").unlink()
    train(run(place, kind, pruner, parts, iters=4, resume=True))
    one, two = ((folder / "pruners.safetensors").read_bytes() for folder in (whole, parts))
    assert one == two
    if pruner == "mlp":
        need = mx.load(str(whole / "pruners.safetensors"))["mlp.mean_need"]
        assert need.item() != 1


def test_needs_are_learned_beside_the_answers_and_reported_apart(place, tmp_path):
    trainer = make_trainer(run(place, "llava", "mlp", tmp_path / "a"), Processes())
    learner = trainer.learner
    learner.begin_step(1, 3)
    loss, answers = learner.losses(trainer.data.batch(np.arange(2)))
    assert loss.item() > answers.item() > 0


REFUSALS = {
    "attention_pool cannot prune a smolvlm model: it makes a number of slots from a picture": {
        "kind": "smolvlm"
    },
    "attention_pool makes a number of slots from every image: give keep_tokens": {
        "keep_tokens": None, "keep_ratio": 0.5,
    },
    "attention_pool does not learn in a llava model: mlx-vlm puts its": {"kind": "llava"},
}  # fmt: skip


@pytest.mark.parametrize("fault", REFUSALS)
def test_a_pool_that_cannot_be_trained_is_refused_in_one_sentence(place, tmp_path, fault):
    keys = dict(REFUSALS[fault])
    kind = keys.pop("kind", "qwen2_5_vl")
    with pytest.raises(UserError, match=fault):
        make_trainer(run(place, kind, "attention_pool", tmp_path / "x", **keys), Processes())


@pytest.mark.parametrize("fault", [*REFUSALS][1:])
def test_another_method_of_trained_slots_is_refused_by_the_same_rules(
    place, tmp_path, fault, monkeypatch
):
    """The rules ask what a method does, not its name."""
    monkeypatch.setitem(
        METHODS, "other_pool", replace(METHODS["attention_pool"], name="other_pool")
    )
    keys = dict(REFUSALS[fault])
    settings = run(place, keys.pop("kind", "qwen2_5_vl"), "other_pool", tmp_path / "x", **keys)
    with pytest.raises(UserError, match=fault.replace("attention_pool", "other_pool")):
        make_trainer(settings, Processes())
