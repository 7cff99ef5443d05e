"""Promises of gradient checkpointing: the same numbers from less memory."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.training import recompute
from mlx_vlm_prune.training.config import TrainConfig
from mlx_vlm_prune.training.processes import Processes
from mlx_vlm_prune.training.run import make_trainer
from mlx_vlm_prune.training.trainer import Trainer

from .training_runs import write_model_and_data


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    return write_model_and_data(tmp_path_factory.mktemp("desk"))


def trainer(desk, **more) -> Trainer:
    values = {"data": str(desk / "data"), "model": str(desk / "model/mlx"), "batch_size": 3}
    return make_trainer(TrainConfig.of({"stage": "sft", **values, **more}, "here"), Processes())


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"stage": "pretrain"},
        {"pruner": "divprune", "keep_tokens": 8},
        {"pruner": "tome", "keep_tokens": 5},  # merged tokens have a bias
        {"stage": "lora", "num_layers": 2},
    ],
    ids=["sft", "pretrain", "pruned", "merged", "lora"],
)
def test_the_loss_and_every_gradient_are_the_same_with_and_without(desk, more):
    losses, by_name = [], []
    for grad_checkpoint in (False, True):
        run = trainer(desk, grad_checkpoint=grad_checkpoint, **more)
        batch = run.batch(0, 0)
        assert batch
        (loss, _), gradients = run.loss_and_gradients(batch)
        losses.append(loss.item())
        by_name.append(dict(tree_flatten(gradients)))
        run.step(0)  # and the weights are no arrays of the backward pass
        mx.eval(run.learner.parameters())
        figures = run.evaluate()  # whose caches are filled
        losses.append(figures["val_loss"])
    assert losses[:2] == pytest.approx(losses[2:], rel=1e-5)
    assert by_name[0].keys() == by_name[1].keys()
    for name, gradient in by_name[0].items():
        largest = max(1e-6, float(mx.abs(gradient).max().item()))
        assert np.allclose(gradient, by_name[1][name], rtol=1e-4, atol=1e-5 * largest), name


def test_answers_are_generated_as_without(desk):
    runs = [trainer(desk, grad_checkpoint=on) for on in (False, True)]
    assert runs[0].evaluate() == runs[1].evaluate()


def test_memory_is_less(desk):
    peaks = []
    for grad_checkpoint in (True, False):
        run = trainer(desk, grad_checkpoint=grad_checkpoint, batch_size=6)
        batch = run.batch(0, 0)
        mx.eval(run.learner.parameters())
        mx.reset_peak_memory()
        mx.eval(run.loss_and_gradients(batch))
        peaks.append(mx.get_peak_memory() - mx.get_active_memory())
    assert peaks[0] < 0.8 * peaks[1]


def test_a_method_that_reads_what_layers_hold_is_refused(desk):
    with pytest.raises(UserError, match="grad_checkpoint cannot be used with fastv, which drops"):
        trainer(desk, grad_checkpoint=True, pruner="fastv", keep_tokens=12)


@pytest.mark.parametrize("stage", ["sft", "twig"])
@pytest.mark.parametrize("grad_checkpoint", [False, True])
def test_a_long_prompt_is_read_at_once(desk, monkeypatch, stage, grad_checkpoint):
    more = {"stage": stage, "grad_checkpoint": grad_checkpoint, "batch_size": 3}
    more |= {"twig_layer": 1, "twig_layers": 1} if stage == "twig" else {}
    expected = trainer(desk, **more).step(0)
    monkeypatch.setattr("mlx_vlm_prune.models.layers.PREFILL_STEP_SIZE", 8)
    assert trainer(desk, **more).step(0) == expected


def test_only_the_instance_is_changed(desk):
    plain = trainer(desk)
    kind = type(plain.learner.model.language)
    recompute.recompute_layers(plain.learner)
    assert type(trainer(desk).learner.model.language) is kind
    assert isinstance(plain.learner.model.language, kind)
