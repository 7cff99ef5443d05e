"""Every stage learns the same in MLX and in the reference: gradients, steps and files."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_unflatten
from safetensors.numpy import load_file

from mlx_vlm_prune import load
from mlx_vlm_prune.checkpoints.checkpoint import LEARNED_FILE
from mlx_vlm_prune.checkpoints.reading.files import write_safetensors
from torch_ref.models.learned import learned_tensors
from torch_ref.models.loading import load_folder
from torch_ref.pruners import METHODS
from torch_ref.training.adapters import LoRALinear

from .training_pairs import (
    CPU,
    KINDS,
    Runs,
    assert_same,
    assert_same_moves,
    mlx_gradients,
    steps,
    torch_gradients,
    weights,
)

K = 5
STAGES = {
    "pool": ("pruner", {"pruner": "attention_pool", "keep_tokens": K}),
    "pool and projector": ("pretrain", {"pruner": "attention_pool", "keep_tokens": K}),
    "scorer": ("pruner", {"pruner": "score_prune", "keep_tokens": K}),
    "scorer with all": (
        "pruner",
        {"pruner": "score_prune", "keep_tokens": K, "unfreeze": ("projector", "language")},
    ),
    "mlp": ("pruner", {"pruner": "mlp", "keep_tokens": K}),
    "learn_prune": ("pruner", {"pruner": "learn_prune", "keep_tokens": K}),
    "mlp with all": ("sft", {"pruner": "mlp", "keep_tokens": K}),
    "twig": ("twig", {"twig_layer": 1, "twig_layers": 1}),
    "lora": ("lora", {"unfreeze": ["projector"]}),
    "lora of two matrices": (
        "lora",
        {"num_layers": 1, "lora_parameters": {
            "rank": 3, "scale": 2.0, "keys": ["self_attn.q_proj", "mlp.down_proj"],
        }},
    ),
    "dora": ("dora", {}),
    "tower": ("pretrain", {"unfreeze": ("tower",), "freeze": ("projector",)}),
    "last layer": ("pretrain", {"language_layers": 1}),
}  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def runs(request, tmp_path_factory) -> Runs:
    """With untrained weights of every learned method beside the model."""
    runs = Runs.written(request.param, tmp_path_factory.mktemp("runs"))
    torch.manual_seed(3)
    tensors = {}
    for name in ("attention_pool", "score_prune", "mlp", "learn_prune"):
        module = METHODS[name].make_weights(32, K)
        if (
            name == "mlp"
        ):  # with a mean of 1 the first step would centre the needs: no gradient left
            module.mean_need.fill_(2.0)
        tensors |= learned_tensors(name, module)
    write_safetensors(runs.folder / "model" / LEARNED_FILE, tensors, "mlx")
    return runs


def trainers(runs: Runs, case: str, out: str = "out"):
    """Both, with the same first values; those of adapters are in all their matrices."""
    stage, keys = STAGES[case]
    config = runs.config(stage, out, **({"noise": 0} if "pruner" in keys else {}), **keys)
    ours, reference = runs.mlx(config), runs.torch(config)
    if stage in ("lora", "dora"):
        random = np.random.default_rng(0)
        first = {
            name: array + 0.02 * random.normal(size=array.shape).astype(np.float32)
            for name, array in weights(ours).items()
        }
        ours.learner.update(tree_unflatten([(k, mx.array(v)) for k, v in first.items()]))
        for name, value in first.items():
            reference.learner.to_ours(reference.learner.parameters)
            into(reference, name, value)
    return ours, reference


def into(trainer, name: str, value: np.ndarray) -> None:
    """Set what a checkpoint calls `name`."""
    learner = trainer.learner
    names = dict(zip(learner.to_ours(learner.parameters), learner.parameters, strict=True))
    learner.parameters[names[name]].data.copy_(torch.tensor(value))


@pytest.mark.parametrize("case", STAGES)
def test_a_stages_loss_and_gradients_equal_the_references(runs, case):
    ours, reference = trainers(runs, case)
    batch = ours.batch(0, 0)
    for trainer in (ours, reference):
        trainer.learner.begin_step(0, 10)
    ours.learner.train()
    (loss, gradients), (theirs_loss, theirs) = (
        mlx_gradients(ours, batch), torch_gradients(reference, batch),
    )  # fmt: skip
    assert loss == pytest.approx(theirs_loss, rel=1e-4)
    assert_same(gradients, theirs, 1e-4)


@pytest.mark.parametrize("case", STAGES)
def test_a_stages_steps_equal_the_references(runs, case):
    if runs.kind != "qwen3 and siglip":
        pytest.skip("the first gradients are compared in both kinds, ten steps in one")
    ours, reference = trainers(runs, case)
    ours.learner.train()
    losses, after, moves = steps(ours, 10)
    theirs_losses, theirs, their_moves = steps(reference, 10)
    np.testing.assert_allclose(losses, theirs_losses, rtol=1e-3)
    assert_same(after, theirs, 1e-3)
    assert_same_moves(moves, their_moves)


@pytest.mark.parametrize("case", ["pool", "mlp with all", "twig"])
def test_what_the_reference_trained_is_read_by_both(runs, tmp_path, case):
    _, reference = trainers(runs, case, str(tmp_path))
    reference.run()
    _, checkpoint = load_folder(tmp_path, CPU)
    name = {"pool": "attention_pool", "mlp with all": "mlp"}.get(case, case)
    model, _ = load(tmp_path)
    held = load_file(tmp_path / LEARNED_FILE)
    assert name in model.learned and checkpoint.learned_file == tmp_path / LEARNED_FILE
    learned = {k.removeprefix(f"{name}."): v for k, v in held.items() if k.startswith(f"{name}.")}
    prefix = "twig." if case == "twig" else f"pruners.{name}."
    saved = {k.removeprefix(prefix): v for k, v in weights(reference).items() if prefix in k}
    assert saved and all(np.array_equal(learned[key], value) for key, value in saved.items())


@pytest.mark.parametrize("case", ["lora", "dora"])
def test_adapters_of_the_reference_are_read_by_mlx(runs, tmp_path, case):
    from mlx_vlm_prune.models.adapters import load_adapters

    _, reference = trainers(runs, case, str(tmp_path))
    reference.run()
    model, _ = load(runs.folder / "model", dtype="float32")
    load_adapters(model, tmp_path)
    batch = reference.batch(0, 0)
    prompt = batch.prompts[0]
    pixels_1HW3 = batch.pixels_IHW3[: len(prompt.runs)] if prompt.runs else None
    from mlx_vlm_prune.pruners import plan

    ours = model([prompt], None if pixels_1HW3 is None else mx.array(pixels_1HW3), plan("none"), 16)
    with torch.no_grad():
        pixels = None if pixels_1HW3 is None else torch.tensor(pixels_1HW3).permute(0, 3, 1, 2)
        theirs = reference.learner.model.logits([prompt], pixels)[:, -1].numpy()
    np.testing.assert_allclose(np.array(ours.logits_BV), theirs, rtol=1e-3, atol=1e-4)


def test_lora_equals_pefts_on_the_same_first_values():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(12, 7))
    adapter = LoRALinear(base[0], rank=3, scale=2.5, dropout=0.0)
    adapter.lora_b.data.normal_()
    config = peft.LoraConfig(r=3, lora_alpha=7.5, target_modules=["0"], lora_dropout=0.0)
    theirs = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(12, 7)), config)
    layer = theirs.base_model.model[0]
    layer.base_layer.load_state_dict(base[0].state_dict())
    layer.lora_A["default"].weight.data.copy_(adapter.lora_a.T)
    layer.lora_B["default"].weight.data.copy_(adapter.lora_b.T)
    x = torch.randn(5, 12)
    ours, expected = adapter(x), theirs(x)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    ours.square().sum().backward()
    expected.square().sum().backward()
    for mine, other in ((adapter.lora_a, "lora_A"), (adapter.lora_b, "lora_B")):
        gradient = getattr(layer, other)["default"].weight.grad.T
        torch.testing.assert_close(mine.grad, gradient, rtol=1e-4, atol=1e-5)
