"""Adapters learn as peft's do: the first gradients, and ten steps of AdamW."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx import nn
from mlx.utils import tree_flatten
from transformers import LlamaConfig, LlamaForCausalLM

pytest.importorskip("peft", reason="peft is not installed")
pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

import peft

from mlx_vlm_prune.models.adapters import adapters
from mlx_vlm_prune.training.optimizer import make_optimizer
from mlx_vlm_prune.training.stages import LEARNERS

from . import tiny
from .training_data import batch, config, loaded, without_images
from .training_runs import write_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's, of transformers
RANK, SCALE, STEPS = 4, 2.5, 10
TEXTS = ("what does # the sign say ?", "what is the # colour ?")
KEYS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("peft") / "model")


def language_of(model) -> LlamaForCausalLM:
    """transformers' Llama with the weights of a language model of ours."""
    c = tiny.TEXT
    llama = LlamaForCausalLM(LlamaConfig(
        hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers, num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads, vocab_size=c.vocab_size,
        rms_norm_eps=c.rms_norm_eps, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
    ))  # fmt: skip
    arrays = dict(tree_flatten(model.language.parameters()))
    state = {f"model.{name}": torch.tensor(np.array(x)) for name, x in arrays.items()}
    missing, unexpected = llama.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    return llama


def with_adapters(model, dora: bool, dropout: float = 0.0):
    """The same in peft, whose scale is alpha ÷ rank."""
    settings = peft.LoraConfig(
        r=RANK, lora_alpha=SCALE * RANK, lora_dropout=dropout, target_modules=sorted(KEYS),
        use_dora=dora, task_type="CAUSAL_LM",
    )  # fmt: skip
    return peft.get_peft_model(language_of(model), settings)


def pairs(learner, theirs):
    """(name, ours, theirs) of every tensor that learns; theirs as torch has it."""
    names = {"lora_a": "lora_A.default.weight", "lora_b": "lora_B.default.weight"}
    names["m"] = "lora_magnitude_vector.default.weight"
    parameters = dict(theirs.named_parameters())
    for path, module in adapters(learner.model):
        inner = path.removeprefix("language.")
        for key in ("lora_a", "lora_b", "m"):
            if key in module:
                yield (
                    (path, key),
                    module,
                    parameters[f"base_model.model.model.{inner}.{names[key]}"],
                )


def loss_of(theirs, read) -> torch.Tensor:
    """Mean over the answers' tokens."""
    total, count = torch.tensor(0.0), 0
    for prompt, flags in zip(read.prompts, read.is_answer, strict=True):
        ids, wanted = torch.tensor([prompt.ids]), torch.tensor(flags[1:])
        logits = theirs(input_ids=ids).logits[0, :-1][wanted]
        total = total + torch.nn.functional.cross_entropy(
            logits, ids[0, 1:][wanted], reduction="sum"
        )
        count += int(wanted.sum())
    return total / count


@pytest.mark.parametrize("stage", ["lora", "dora"])
def test_the_first_gradients_and_ten_steps_are_pefts(folder, stage):
    read = batch([without_images(tiny.row(text)) for text in TEXTS], 2, 64)
    c = config(stage, "x", "y", lora_parameters={"rank": RANK, "scale": SCALE}, learning_rate=1e-3)
    theirs = with_adapters(loaded(folder), stage == "dora")
    learner = LEARNERS[stage](loaded(folder), c)
    random = np.random.default_rng(0)
    for (_, key), module, parameter in pairs(learner, theirs):
        if key == "lora_b":  # as if it had learned, so that all gradients differ from 0
            module.lora_b = mx.array(random.normal(0, 0.1, module.lora_b.shape).astype(np.float32))
        if key != "m":
            parameter.data = torch.tensor(np.array(module[key])).T.contiguous()
    optimizer = make_optimizer(c)
    adam = torch.optim.AdamW(
        [p for p in theirs.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.01
    )
    for step in range(STEPS):
        total, gradients = nn.value_and_grad(learner, learner.loss)(read)
        adam.zero_grad()
        expected = loss_of(theirs, read)
        expected.backward()
        gradients = nn.utils.tree_map(lambda x: x / read.answer_tokens, gradients)
        assert float(total) / read.answer_tokens == pytest.approx(expected.item(), rel=1e-4)
        if not step:
            flat = dict(tree_flatten(gradients))
            for (path, key), _, parameter in pairs(learner, theirs):
                close(np.array(flat[f"model.{path}.{key}"]), parameter.grad, 1e-4)
        optimizer.update(learner, gradients)
        mx.eval(learner.parameters())
        adam.step()
    for (_, key), module, parameter in pairs(learner, theirs):
        close(np.array(module[key]), parameter.data, 1e-3)


def close(ours: np.ndarray, theirs: torch.Tensor, tolerance: float) -> None:
    """Within a share of the largest value."""
    expected = theirs.detach().numpy()
    expected = expected.T if expected.ndim == 2 else expected
    assert np.abs(expected).max() > 0
    np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance * np.abs(expected).max())
