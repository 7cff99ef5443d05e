"""Promises of the stages: each moves what it names, nothing else, and loses nothing it learned."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx import nn
from mlx.utils import tree_flatten

from convert.__main__ import main as convert
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.checkpoints.families import read_checkpoint
from mlx_vlm_prune.checkpoints.reading.files import open_safetensors
from mlx_vlm_prune.models.loading import load_folder
from mlx_vlm_prune.pruners.scorer import straight_through
from mlx_vlm_prune.training.base_model import load_base_model
from mlx_vlm_prune.training.batches import Batch
from mlx_vlm_prune.training.config import TrainConfig
from mlx_vlm_prune.training.learner import Learner
from mlx_vlm_prune.training.recompute import recompute_layers
from mlx_vlm_prune.training.run import train
from mlx_vlm_prune.training.stages import LEARNERS
from tests import stage_runs, tiny, training_data
from torch_ref.pruners.numerics import straight_through as reference_factor

PROMPTS = ("how many # red circle one two", "which shape # blue square two one")  # answers end them
ANSWER = 2  # ids of it


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The reference's model with random weights of learned methods, and a folder of the same."""
    model = tiny.taught(tiny.reference())
    return model, tiny.checkpoint(model, tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A folder without learned methods."""
    return tiny.checkpoint(tiny.reference(), tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return stage_runs.write(tmp_path_factory.mktemp("data"), 4)


def settings(stage: str, **keys) -> TrainConfig:
    return TrainConfig.of({"stage": stage, "data": "none", **keys}, "the test")


def two_prompts() -> Batch:
    """Two prompts of one length."""
    prompts = [tiny.row(text) for text in PROMPTS]
    L = len(prompts[0].ids)
    assert all(len(prompt.ids) == L for prompt in prompts)
    pixels = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)
    return Batch(prompts, [np.arange(L) >= L - ANSWER] * 2, pixels)


def gradients(learner: Learner, batch: Batch) -> tuple[float, dict[str, np.ndarray]]:
    """The mean loss and its gradients."""
    learner.train()
    loss, tree = nn.value_and_grad(learner, learner.loss)(batch)
    n = batch.answer_tokens
    return loss.item() / n, {name: np.array(x) / n for name, x in tree_flatten(tree)}


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("score_prune", {}), ("mlp", {}), ("norm+restore:published", {"unfreeze": ["language"]}),
        ("score_prune", {"unfreeze": ["language"]}), ("twig", {"twig_layer": 1, "twig_layers": 1}),
        ("mlp", {"unfreeze": ["language", "projector"]}),
    ],
)  # fmt: skip
def test_recomputed_layers_change_no_gradient(pair, name, keys):
    """With grad_checkpoint."""
    stage = {"twig": "twig", "norm+restore:published": "sft"}.get(name, "pruner")
    more = {} if stage == "twig" else {"pruner": name, "keep_tokens": 5}
    more |= {"noise": 0} if stage == "pruner" else {}
    results = []
    for recompute in (False, True):
        model = load_folder(pair[1], "x", "float32")[0]
        learner = LEARNERS[stage](model, settings(stage, **keys, **more))
        if recompute:
            recompute_layers(learner)
        results.append(gradients(learner, two_prompts()))
    (loss, plain), (again, recomputed) = results
    assert loss == pytest.approx(again, rel=1e-6) and plain.keys() == recomputed.keys()
    assert all(np.allclose(recomputed[n], plain[n], rtol=1e-4, atol=1e-6) for n in plain)


def test_budgets_come_in_turn_and_the_noise_falls_to_zero(pair):
    keys = {"pruner": "score_prune", "keep_tokens": 5}
    learner = LEARNERS["pruner"](load_folder(pair[1], "x")[0], settings("pruner", **keys))
    seen = []
    for step in range(4):
        learner.begin_step(step, 4)
        seen.append((learner._budget(), round(learner._noise(), 3)))
    assert seen == [(2, 1.0), (5, 0.854), (10, 0.5), (2, 0.146)]
    wide = settings("pruner", pruner="score_prune", keep_tokens=12)
    learner = LEARNERS["pruner"](load_folder(pair[1], "x")[0], wide)
    learner.begin_step(2, 4)
    assert learner._budget() == tiny.N  # never more than there are


def test_the_noise_is_gumbels():
    mx.random.seed(0)
    score_BN = mx.broadcast_to(mx.log(mx.array([0.5, 0.3, 0.2])), (20000, 3))
    kept = (straight_through(score_BN, 1, 1.0) > 0.5).astype(mx.float32)
    assert np.abs(np.array(kept.mean(axis=0)) - [0.5, 0.3, 0.2]).max() < 0.02


def test_gradients_stay_finite_where_a_dropped_token_would_take_all_attention():
    """In either framework; a sharp model's logits differ by more than the factor makes up for."""
    weight = [[3e25, -1.0, 1e18]]  # what comes of such a token
    score_BN = mx.array([[1.0, 2.0, 0.5]])
    ours = mx.grad(lambda s: (straight_through(s, 1, 0.0) * mx.array(weight)).sum())(score_BN)
    theirs = torch.tensor([[1.0, 2.0, 0.5]], requires_grad=True)
    (reference_factor(theirs, 1, 0.0) * torch.tensor(weight)).sum().backward()
    assert np.allclose(np.array(ours), theirs.grad, rtol=1e-5)
    assert 1e11 < np.abs(np.array(ours)).max() <= 1e12


def moved(start, folder) -> set[str]:
    """Parts of the model, or learned methods beside it, whose bits differ from the start's."""
    before, after = read_checkpoint(start).tensors, read_checkpoint(folder).tensors
    changed = {name for name in after if name not in before or after[name] != before[name]}
    assert after.keys() >= before.keys()
    files = [path / "pruners.safetensors" for path in (start, folder)]
    old, new = ({} if not f.exists() else open_safetensors(f) for f in files)
    changed |= {name for name in new if name not in old or new[name] != old[name]}
    layers = {".".join(name.split(".")[:3]) for name in changed if ".layers." in name}
    return {name.split(".")[0] for name in changed} | {x for x in layers if "language" in x}


LAYERS = {f"language.layers.{i}" for i in range(3)}
POOL = {"pruner": "attention_pool", "keep_tokens": 5}
MOVES = {
    "pretrain": ("pretrain", {}, {"projector"}),
    "pretrain behind visionzip": (
        "pretrain", {"pruner": "visionzip", "keep_tokens": 5}, {"projector"},
    ),
    "EfficientVLM's": (
        "pretrain", {"language_layers": 1, **POOL},
        {"projector", "pruner", "language", "language.layers.2"},
    ),
    "pretrain, projector frozen": ("pretrain", {"freeze": "projector", **POOL}, {"pruner"}),
    "sft": ("sft", {}, {"projector", "language", *LAYERS}),
    "sft with a pool": ("sft", POOL, {"projector", "pruner", "language", *LAYERS}),
    "sft, language frozen": ("sft", {"freeze": "language"}, {"projector"}),
    "sft, projector frozen": ("sft", {"freeze": "projector"}, {"language", *LAYERS}),
    "sft, two layers": (
        "sft", {"language_layers": 2},
        {"projector", "language", "language.layers.1", "language.layers.2"},
    ),
    "sft, the tower along": (
        "sft", {"unfreeze": "tower"}, {"tower", "projector", "language", *LAYERS},
    ),
    "sft, the tower frozen": ("sft", {"freeze": "tower"}, {"projector", "language", *LAYERS}),
    "pool": ("pruner", POOL, {"pruner"}),
    "score_prune, the language model along": (
        "pruner", {"pruner": "score_prune", "keep_tokens": 5, "unfreeze": "language"},
        {"score_prune", "language", *LAYERS},
    ),
    "score_prune": ("pruner", {"pruner": "score_prune", "keep_tokens": 5}, {"score_prune"}),
    "mlp": ("pruner", {"pruner": "mlp", "keep_tokens": 5}, {"mlp"}),
    "mlp with its projector": (
        "pruner", {"pruner": "mlp", "keep_tokens": 5, "unfreeze": "projector"},
        {"mlp", "projector"},
    ),
    "twig": ("twig", {"twig_layer": 1, "twig_layers": 1}, {"twig"}),
}  # fmt: skip


@pytest.mark.parametrize("case", MOVES)
def test_a_stage_moves_what_it_should_and_no_bit_else(plain, data, tmp_path, case):
    stage, keys, parts = MOVES[case]
    config = stage_runs.config(stage, plain, data, tmp_path / "out", **keys)
    train(config)
    assert moved(plain, tmp_path / "out") == parts


@pytest.mark.parametrize("name", ["attention_pool", "score_prune"])
def test_a_trained_pruner_that_is_frozen_keeps_its_bits(plain, data, tmp_path, name):
    keys = {"pruner": name, "keep_tokens": POOL["keep_tokens"]}
    first = tmp_path / "first"
    train(stage_runs.config("pruner", plain, data, first, **keys))
    train(stage_runs.config("sft", first, data, tmp_path / "out", freeze="pruner", **keys))
    assert moved(first, tmp_path / "out") == {"projector", "language", *LAYERS}


def test_a_tower_that_learns_keeps_what_nothing_reads(plain, data, tmp_path):
    train(stage_runs.config("pretrain", plain, data, tmp_path / "out", unfreeze="tower"))
    before, after = (read_checkpoint(f).tensors for f in (plain, tmp_path / "out"))
    assert after["tower.post_layernorm.weight"] == before["tower.post_layernorm.weight"]
    same = [n for n in after if n.startswith("tower.") and after[n] == before[n]]
    assert all("post_layernorm" in name for name in same)


REFUSALS = {
    "no method": ("pruner", {"pruner": "divprune"}, "divprune has nothing to learn; stage pruner"),
    "a twig by another stage": ("pruner", {"pruner": "twig"}, "twig has nothing to learn; stage"),
    "unfreeze": ("sft", {"pruner": "norm", "unfreeze": "pruner"}, "norm has nothing to learn"),
    "nothing": ("pretrain", {"freeze": "projector"}, "nothing is left to learn"),
    "a frozen pool that is none": ("sft", {"freeze": "pruner", **POOL}, "holds no weights for it"),
    "more tokens": ("pruner", {**POOL, "keep_tokens": 17}, "an image has 1 to 16 visual tokens"),
    "a chain": (
        "pruner", {"pruner": "visionzip+score_prune", "keep_tokens": 4}, "score_prune learns alone",
    ),
    "float16": (
        "pruner", {"pruner": "mlp", "keep_tokens": 4, "dtype": "float16"}, "float16 cannot hold",
    ),
    "a twig and a pruner": ("twig", {"pruner": "divprune"}, "a twig learns with all visual tokens"),
    "a twig too deep": ("twig", {"twig_layer": 3}, "grows on layer 1 to 2"),
    "a twig too long": ("twig", {"twig_layer": 2, "twig_layers": 2}, "has no beginning in 3 layer"),
    "too many layers": ("sft", {"language_layers": 4}, "language_layers is 4; the model has 3"),
    "all tokens in a pool": ("sft", {**POOL, "keep_tokens": 16}, "is never used; keep fewer"),
    "a twig's base": ("twig", {"unfreeze": "language"}, "unfreeze has no effect in stage twig"),
    "adapters of no whole model": (
        "lora", {"tower": "clip", "model": "llm.pth"}, "stage lora needs a whole model",
    ),
    "a tokenizer alone": ("sft", {"tokenizer": "x"}, "tokenizer goes with tower"),
    "a tower without a model": ("sft", {"tower": "clip"}, "name them by model"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_learn_is_said_in_a_sentence(plain, data, tmp_path, case):
    stage, keys, sentence = REFUSALS[case]
    with pytest.raises(UserError, match=sentence):
        keys = {"model": None if "tower" in keys else str(plain), **keys}
        train(training_data.config(stage, data, tmp_path / "out", **keys))
    assert not (tmp_path / "out/config.json").exists()


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_what_learns_is_in_float32_wherever_the_rest_is(plain, tmp_path, monkeypatch, stored):
    """On a GPU a model is loaded in its checkpoint's own dtype."""
    convert(["to-mlx", str(plain), str(tmp_path / "half"), "--dtype", stored])
    monkeypatch.setattr("mlx_vlm_prune.models.loading.on_cpu", lambda: False)
    rest = mx.float32 if stored == "float16" else mx.bfloat16
    for stage, keys in (
        ("pretrain", {}), ("pretrain", {"language_layers": 1}), ("pruner", POOL),
        ("pruner", {"pruner": "mlp", "keep_tokens": 5}),
        ("twig", {"twig_layer": 1, "twig_layers": 1}),
    ):  # fmt: skip
        config = settings(stage, model=str(tmp_path / "half"), **keys)
        learner = LEARNERS[stage](load_base_model(config)[0], config)
        learns = dict(tree_flatten(learner.trainable_parameters()))
        stays = [
            x for n, x in tree_flatten(learner.model.parameters()) if f"model.{n}" not in learns
        ]
        assert {x.dtype for x in learns.values()} == {mx.float32}
        assert {x.dtype for x in stays} == {rest}
        loss, by_name = gradients(learner, two_prompts())
        assert np.isfinite(loss) and all(np.isfinite(x).all() for x in by_name.values())
