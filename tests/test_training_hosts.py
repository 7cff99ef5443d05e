"""Promises of `lora` and `dora` in mlx-vlm's models: a pruner in the loop, and files that load."""

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")

from mlx_vlm.utils import load as mlx_vlm_load

from mlx_vlm_prune import generate, load
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.hosts.host import ADAPTERS
from mlx_vlm_prune.hosts.prefill import HostPrefill
from mlx_vlm_prune.hosts.prompt import (
    budgets_by_view,
    encode_images_and_text,
    prepare_prompt,
    prune_prompt,
)
from mlx_vlm_prune.inputs.image import open_image
from mlx_vlm_prune.models.adapters import adapter_key
from mlx_vlm_prune.training.run import make_trainer, train

from .host_folders import desk
from .training_data import bits, config

KINDS = ["qwen2_5_vl", "smolvlm"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny checkpoint of each kind, and four questions about two pictures."""
    folder = desk(tmp_path_factory.mktemp("hosts"), KINDS)
    lines = [
        {"image": f"{'ab'[i % 2]}.png", "question": "w7 w9", "answer": f"w{20 + i % 2}"}
        for i in range(4)
    ]
    for split in ("train", "valid"):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def run(place, kind, out, **keys):
    """A config for a run of a few steps."""
    values = {"model": str(place / kind), "dtype": "float32", "num_layers": 2, **keys}
    stage, data = values.pop("stage", "lora"), values.pop("data", place / "train.jsonl")
    return config(stage, data, out, **values)


@pytest.mark.parametrize(
    ("stage", "pruner"), [("lora", "none"), ("lora", "divprune"), ("dora", "divprune")]
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_host_learns_behind_a_pruner_and_only_adapters_move(place, tmp_path, kind, stage, pruner):
    budget = {"keep_ratio": 0.5} if pruner != "none" else {}
    c = run(place, kind, tmp_path / "a", stage=stage, iters=6, pruner=pruner, **budget)
    before = bits(load(place / kind, dtype="float32")[0])
    trainer = make_trainer(c, _processes())
    batch = trainer.data.batch(np.arange(2))
    first = float(trainer.learner.loss(batch))
    trainer.run()
    trainer.learner.eval()
    assert float(trainer.learner.loss(batch)) < first
    after = {n.replace(".linear.", "."): x for n, x in bits(trainer.learner.model).items()}
    assert all(after[name] == before[name] for name in before)
    learned = after.keys() - before.keys()
    assert learned and not any(".layers.0." in name for name in learned)
    assert {name.rsplit(".")[-1] for name in learned} == ({"m"} if stage == "dora" else set()) | {
        "lora_a", "lora_b",
    }  # fmt: skip
    assert all(name.startswith("model.language_model.") for name in learned) or all(
        name.startswith("language_model.") for name in learned
    )


@pytest.mark.parametrize("pruner", ["none", "divprune"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_the_answer_in_generation(place, tmp_path, kind, pruner):
    budget = {"keep_ratio": 0.5} if pruner != "none" else {}
    c = run(place, kind, tmp_path / "a", pruner=pruner, **budget)
    trainer = make_trainer(c, _processes())
    trainer.learner.eval()
    host, pipeline = trainer.learner.host, trainer.learner.pipeline
    batch = trainer.data.batch(np.arange(1))
    inputs = prepare_prompt(host, "w7 w9", [open_image(place / "a.png")])
    answer = batch.inputs[0].ids[len(inputs.ids) :]
    assert batch.inputs[0].ids == [*inputs.ids, *answer] and batch.answer_tokens == len(answer)
    views = encode_images_and_text(host, inputs, pipeline)
    budgets = budgets_by_view(views, budget.get("keep_ratio"), None, pipeline)
    policy = trainer.learner.policy
    prefill = HostPrefill(host, prune_prompt(host, inputs, views, pipeline, budgets, policy))
    logits_LV = [prefill.logits_BV, *prefill.step(mx.array([answer[:-1]]))[0][:, None]]
    expected = sum(
        -nn.log_softmax(x.reshape(-1))[token].item()
        for x, token in zip(logits_LV, answer, strict=True)
    )
    assert trainer.learner.loss(batch).item() == pytest.approx(expected, rel=1e-4)


def test_held_out_examples_have_a_loss(place, tmp_path):
    train(run(place, "smolvlm", tmp_path / "a", data=str(place)))
    lines = (tmp_path / "a/metrics.jsonl").read_text().splitlines()
    assert any("val_loss" in line for line in lines)


def _processes():
    from mlx_vlm_prune.training.processes import Processes

    return Processes()


BAD = {
    "no picture": ({"image": "none.png"}, "none.png"),
    "two turns": ({"conversations": [
        {"role": role, "content": "w7"} for role in ("user", "assistant") * 2
    ]}, "learns from one question and one answer"),
    "more marks": ({"question": "<image> w7 <image>"}, "has 2 <image> marks but 1 image"),
    "a mark within the text": ({"question": "w7 <image> w9"}, "leave <image> out of the prompt"),
    "an image's place in the answer": ({"answer": "<image>"}, "its answer holds the token of an"),
    "too long": ({"question": "w7 " * 600}, r"begins within max_seq_length=512"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_example_is_an_error_or_named_counted_and_left_out(place, tmp_path, caplog, case):
    change, fault = BAD[case]
    example = {"image": str(place / "a.png"), "question": "<image>\nw7 w9", "answer": "w20"}
    bad = {k: v for k, v in (example | change).items()
           if k == "image" or ("conversations" in change) == (k == "conversations")}  # fmt: skip
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, (example, bad))))
    keys = {"data": tmp_path / "d.jsonl"}
    with pytest.raises(UserError, match=fault) as refusal:
        make_trainer(run(place, "smolvlm", tmp_path / "a", **keys), _processes()).data.batch(
            np.arange(2)
        )
    assert "line 2" in str(refusal.value) and "skip_bad leaves" in str(refusal.value)
    data = make_trainer(
        run(place, "smolvlm", tmp_path / "a", skip_bad=True, **keys), _processes()
    ).data
    for _ in range(2):
        assert data.batch(np.arange(2)).indices == (0,)
    assert list(data.bad) == [1]
    assert len([r for r in caplog.records if "line 2" in r.message]) == 1


def test_a_long_answer_is_cut_and_counted(place, tmp_path):
    line = {"image": str(place / "a.png"), "question": "w7", "answer": "w20 " * 600}
    (tmp_path / "d.jsonl").write_text(json.dumps(line))
    trainer = make_trainer(
        run(place, "qwen2_5_vl", tmp_path / "a", data=tmp_path / "d.jsonl"), _processes()
    )
    batch = trainer.data.batch(np.arange(1))
    assert len(batch.prompts[0].ids) == len(batch.inputs[0].ids) == 512 and trainer.data.cut == {0}
    assert batch.inputs[0].mask_1L.shape == (1, 512)
    assert np.isfinite(trainer.learner.loss(batch).item())


def test_options_of_the_chat_template_reach_it(place, tmp_path, monkeypatch):
    options = []
    monkeypatch.setattr(
        "mlx_vlm.prompt_utils.apply_chat_template",
        lambda *a, **k: options.append(k) or "<image> w7",
    )
    c = run(place, "smolvlm", tmp_path / "a", chat_template_config={"enable_thinking": False})
    make_trainer(c, _processes()).data.batch(np.arange(1))
    assert options[-1] == {"num_images": 1, "enable_thinking": False}
    assert not any(given["enable_thinking"] for given in options)


@pytest.mark.parametrize("stage", ["lora", "dora"])
@pytest.mark.parametrize("kind", KINDS)
def test_mlx_vlm_and_we_load_what_was_trained(place, tmp_path, kind, stage):
    train(run(place, kind, tmp_path / "a", stage=stage))
    ours, processor = load(place / kind, adapter_path=tmp_path / "a", dtype="float32")
    theirs, _ = mlx_vlm_load(str(place / kind), adapter_path=str(tmp_path / "a"))
    for (name, one), (_, two) in zip(
        tree_flatten(ours.parameters()), tree_flatten(theirs.parameters()), strict=True
    ):
        assert mx.array_equal(one, two.astype(one.dtype)), name
    assert getattr(ours, ADAPTERS) == adapter_key(tmp_path / "a")  # its calibrations are its own
    keys = {"image": place / "a.png", "max_tokens": 3, "pruner": "divprune", "keep_ratio": 0.5}
    assert generate(ours, processor, "w7 w9", **keys).generation_tokens >= 1


def test_a_run_in_a_host_goes_on_bit_for_bit(place, tmp_path):
    keys = {"lora_parameters": {"dropout": 0.3, "keys": ["self_attn.q_proj", "mlp.up_proj"]}}
    train(run(place, "qwen2_5_vl", tmp_path / "whole", iters=4, **keys))
    train(run(place, "qwen2_5_vl", tmp_path / "parts", iters=2, **keys))
    train(run(place, "qwen2_5_vl", tmp_path / "parts", iters=4, resume=True, **keys))
    whole, parts = (
        (tmp_path / name / "adapters.safetensors").read_bytes() for name in ("whole", "parts")
    )
    assert whole == parts


def test_what_a_host_cannot_do_is_refused_in_one_sentence(place, tmp_path):
    faults = {
        "in which the stages lora, dora, pruner learn": {"stage": "sft"},
        "fastv drops tokens inside the language model": {"pruner": "fastv", "keep_ratio": 0.8},
        "names 'attn.qkv'": {"lora_parameters": {"keys": ["attn.qkv"]}},
        "freeze and unfreeze are for models of ours": {"unfreeze": ["projector"]},
    }
    for fault, keys in faults.items():
        stage = keys.pop("stage", "lora")
        values = {"model": str(place / "qwen2_5_vl"), "dtype": "float32", **keys}
        with pytest.raises(UserError, match=fault):
            make_trainer(
                config(stage, place / "train.jsonl", tmp_path / "x", **values), _processes()
            )


def test_adapters_that_mlx_vlm_would_leave_out_are_refused(place, tmp_path):
    train(run(place, "smolvlm", tmp_path / "a", iters=1))
    with pytest.raises(UserError, match="do not fit this model"):
        load(place / "qwen2_5_vl", adapter_path=tmp_path / "a")
    weights = mx.load(str(tmp_path / "a/adapters.safetensors"))
    weights.pop(sorted(weights)[0])
    mx.save_safetensors(str(tmp_path / "a/adapters.safetensors"), weights)
    with pytest.raises(UserError, match="is None in the file"):
        load(place / "smolvlm", adapter_path=tmp_path / "a")
