"""Training in MLX equals the reference's and transformers': losses, gradients and steps."""

import numpy as np
import pytest

from mlx_vlm_prune.training.config import TrainConfig

from .training_pairs import (
    KINDS,
    Runs,
    assert_same,
    assert_same_moves,
    mlx_gradients,
    steps,
    torch_gradients,
    transformers_gradients,
)

TRAINING_FREE = ("visionzip", "divprune", "tome", "fastv")


@pytest.fixture(scope="module", params=KINDS)
def runs(request, tmp_path_factory) -> Runs:
    return Runs.written(request.param, tmp_path_factory.mktemp("runs"))


def both(runs: Runs, config: TrainConfig):
    """Loss and gradients of the first batch, in MLX and in the reference."""
    trainers = runs.mlx(config), runs.torch(config)
    batches = [trainer.batch(0, 0) for trainer in trainers]
    assert [p.ids for p in batches[0].prompts] == [p.ids for p in batches[1].prompts]
    return mlx_gradients(trainers[0], batches[0]), torch_gradients(trainers[1], batches[1])


def test_first_loss_and_gradients_equal_the_references_and_transformers(runs):
    config = runs.config("sft")
    (loss, ours), (reference_loss, reference) = both(runs, config)
    theirs_loss, theirs = transformers_gradients(runs.kind, runs.mlx(config).batch(0, 0))
    assert loss == pytest.approx(theirs_loss, rel=1e-4)
    assert loss == pytest.approx(reference_loss, rel=1e-4)
    theirs = {k: v for k, v in theirs.items() if not k.endswith("lm_head.weight")}
    assert_same(ours, theirs, 1e-4)
    assert_same(ours, reference, 1e-4)


@pytest.mark.parametrize("pruner", TRAINING_FREE)
@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_gradients_behind_a_pruner_equal_the_references(runs, pruner, stage):
    if runs.kind != "llama and clip" and pruner == "visionzip":
        pruner = "received_attention"  # a tower without CLS
    keep = 12 if pruner == "fastv" else 6
    (loss, ours), (reference_loss, reference) = both(
        runs, runs.config(stage, pruner=pruner, keep_tokens=keep)
    )
    (whole, _), _ = both(runs, runs.config(stage))
    assert loss != pytest.approx(whole, rel=1e-5)
    assert loss == pytest.approx(reference_loss, rel=1e-4)
    assert_same(ours, reference, 1e-4)


OPTIMIZERS = {
    "adamw": {},
    "adamw without correction": {"optimizer_config": {"adamw": {"bias_correction": False}}},
    "adam": {"optimizer": "adam"},
    "sgd": {
        "optimizer": "sgd",
        "optimizer_config": {"sgd": {"momentum": 0.9}},
        "learning_rate": 0.05,
    },
    "a schedule": {
        "lr_schedule": {"name": "cosine_decay", "arguments": [1e-3, 6, 1e-4], "warmup": 3}
    },
    "no clipping": {"grad_clip": 0},
}


@pytest.mark.parametrize("case", OPTIMIZERS)
def test_ten_steps_end_at_the_references_weights(runs, case):
    config = runs.config("sft", **OPTIMIZERS[case])
    (ours_losses, ours, our_moves), (losses, reference, moves) = (
        steps(trainer, 10) for trainer in (runs.mlx(config), runs.torch(config))
    )
    np.testing.assert_allclose(ours_losses, losses, rtol=1e-3)
    assert losses[-1] < losses[0]
    assert_same(ours, reference, 1e-3)
    assert_same_moves(our_moves, moves)


def test_layers_that_are_computed_again_give_the_same_steps(runs):
    keys = {"pruner": "divprune", "keep_tokens": 6}
    plain, again = (
        steps(runs.torch(runs.config("sft", grad_checkpoint=on, **keys)), 3) for on in (False, True)
    )
    assert plain[0] == again[0]
    assert all(np.array_equal(plain[1][name], again[1][name]) for name in plain[1])


@pytest.mark.parametrize("side", ["mlx", "torch"])
def test_accumulated_batches_step_as_one_batch_does(runs, side):
    whole = runs.config("sft", optimizer="sgd", learning_rate=0.1)
    parts = runs.config(
        "sft", optimizer="sgd", learning_rate=0.1, batch_size=2, grad_accumulation_steps=2
    )
    start = getattr(runs, side)
    losses, expected, way = steps(start(whole), 3)
    part_losses, got, part_way = steps(start(parts), 3)
    np.testing.assert_allclose(part_losses, losses, rtol=1e-5)
    assert_same(got, expected, 1e-4)
    assert_same_moves(part_way, way)
