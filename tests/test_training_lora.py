"""Promises of the stages `lora` and `dora`: mlx-lm's layers and files, and nothing else moves."""

import json
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.optimizers import AdamW
from mlx.utils import tree_flatten

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

from mlx_lm.lora import CONFIG_DEFAULTS
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear

from convert.__main__ import main as convert
from mlx_vlm_prune import generate, load
from mlx_vlm_prune.checkpoints.adapters import AdapterConfig
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.generate import main as generate_main
from mlx_vlm_prune.models.adapters import adapter_arrays, adapters, add_adapters
from mlx_vlm_prune.models.language.experts import GATHERED
from mlx_vlm_prune.scenes import CHECKPOINT
from mlx_vlm_prune.training.recompute import recompute_layers
from mlx_vlm_prune.training.run import train
from mlx_vlm_prune.training.stages import LEARNERS

from . import backbones, llava, tiny
from .training_data import batch, bits, config, loaded, logits, without_images
from .training_runs import write_data, write_model

STAGES = ["lora", "dora"]
INFINITE = float("inf")
PICTURE = batch([tiny.row("what is # ?"), tiny.row("# ?")], 1, 64)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny model, data, and adapters that were trained on it."""
    folder = tmp_path_factory.mktemp("lora")
    data, model = write_data(folder / "data"), write_model(folder / "model")
    train(config("lora", data, folder / "adapters", model=str(model)))
    return SimpleNamespace(data=data, model=model, adapters=folder / "adapters", folder=folder)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """The built-in model in a few bits."""
    folder = tmp_path_factory.mktemp("q")

    def make(bits: int):
        target = folder / str(bits)
        if not target.exists():
            convert(["to-mlx", str(CHECKPOINT), str(target), "-q", "--q-bits", str(bits)])
        return target

    return make


def test_the_files_are_those_of_mlx_lm(place):
    names = {path.name for path in place.adapters.iterdir()}
    assert names >= {
        "adapters.safetensors", "adapter_config.json", "0000002_adapters.safetensors",
        "0000003_adapters.safetensors",
    }  # fmt: skip
    written = json.loads((place.adapters / "adapter_config.json").read_text())
    other = {  # mlx-lm's that belong to its own command
        "train", "test", "test_batches", "config", "resume_adapter_file", "mask_prompt",
        "clear_cache_threshold", "trust_remote_code",
    }  # fmt: skip
    assert written.keys() >= CONFIG_DEFAULTS.keys() - other
    assert written["fine_tune_type"] == "lora"
    assert written["lora_parameters"] == CONFIG_DEFAULTS["lora_parameters"]
    newest, last = (
        (place.adapters / name).read_bytes()
        for name in ("adapters.safetensors", "0000003_adapters.safetensors")
    )
    assert newest == last
    arrays = mx.load(str(place.adapters / "adapters.safetensors"))
    assert arrays["language.layers.0.self_attn.q_proj.lora_a"].shape == (tiny.TEXT.hidden_size, 8)
    assert all(name.endswith((".lora_a", ".lora_b")) for name in arrays)


@pytest.mark.parametrize("projector", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_only_adapters_and_a_projector_that_may_move(place, stage, projector):
    c = config(stage, "x", "y", unfreeze=["projector"] * projector, num_layers=2)
    model = loaded(place.model)
    before = bits(model)
    after = bits(trained(model, c).model)
    learned = {name for name in after if name.rsplit(".")[-1] in ("lora_a", "lora_b", "m")}
    assert len(learned) == 2 * 7 * (3 if stage == "dora" else 2)
    assert not any(".layers.0." in name for name in learned)
    others = {name.replace(".linear.", "."): x for name, x in after.items() if name not in learned}
    assert others.keys() == before.keys()
    moved = {name for name in before if others[name] != before[name]}
    assert moved == ({n for n in before if n.startswith("projector.")} if projector else set())


def trained(model, c, read=PICTURE, steps=3):
    """The stage's learner after some steps."""
    learner, optimizer = LEARNERS[c.stage](model, c), AdamW(c.learning_rate)
    learner.train()
    for _ in range(steps):
        step(learner, optimizer, read)
    learner.eval()
    return learner


def step(learner, optimizer, read):
    _, gradients = nn.value_and_grad(learner, learner.loss)(read)
    optimizer.update(learner, gradients)
    mx.eval(learner.parameters())


@pytest.mark.parametrize(
    ("stage", "bit_count"), [("lora", 3), ("dora", 4), ("lora", 6), ("dora", 6)]
)
def test_a_quantized_base_learns_and_keeps_its_bits(quantized, stage, bit_count):
    model = loaded(quantized(bit_count))
    before, start = bits(model), logits(model, scene(model))
    learner = LEARNERS[stage](model, config(stage, "x", "y"))
    learner.eval()
    np.testing.assert_allclose(logits(model, scene(model)), start, atol=2e-3)
    learner = trained(loaded(quantized(bit_count)), config(stage, "x", "y"), scene(model))
    after = {name.replace(".linear.", "."): x for name, x in bits(learner.model).items()}
    assert all(after[name] == before[name] for name in before)
    assert np.abs(logits(learner.model, scene(model)) - start).max() > 0.1


def scene(model):
    """A prompt for the built-in model's sizes."""
    prompt = tiny.row("what is # ?")
    start, spare = prompt.runs[0][0], model.N - tiny.N
    ids = [*prompt.ids[:start], *[tiny.IMAGE] * spare, *prompt.ids[start:]]
    side = model.config.vision.image_size
    return batch([type(prompt)(ids, [(start, model.N)])], 1, side)


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_with_dropout_goes_on_bit_for_bit(place, tmp_path, stage):
    keys = {"model": str(place.model), "lora_parameters": {"dropout": 0.3}, "num_layers": 1}
    train(config(stage, place.data, tmp_path / "whole", iters=5, **keys))
    train(config(stage, place.data, tmp_path / "parts", iters=2, **keys))
    train(config(stage, place.data, tmp_path / "parts", iters=5, resume=True, **keys))
    whole, parts = (
        (tmp_path / name / "adapters.safetensors").read_bytes() for name in ("whole", "parts")
    )
    assert whole == parts
    one, two = (
        mx.load(str(tmp_path / name / "checkpoints/0000005/optimizer.safetensors"))
        for name in ("whole", "parts")
    )
    assert one.keys() == two.keys()
    assert all(np.array_equal(np.array(one[name]), np.array(two[name])) for name in one)


def test_dropout_follows_from_the_seed_and_is_off_afterwards(place):
    def first(seed: int) -> bytes:
        c = config("lora", "x", "y", seed=seed, lora_parameters={"dropout": 0.5})
        return bits(LEARNERS["lora"](loaded(place.model), c).model)[NAME][1]

    assert first(0) == first(0) != first(1)
    model, _ = load(place.model, adapter_path=place.adapters)
    assert not model.training
    np.testing.assert_array_equal(logits(model, PICTURE), logits(model, PICTURE))


@pytest.mark.parametrize("stage", STAGES)
def test_layers_computed_again_drop_what_they_dropped_before(place, stage):
    c = config(stage, "x", "y", lora_parameters={"dropout": 0.4, "scale": 5.0})
    by_name = []
    for again in (False, True):
        learner = LEARNERS[stage](loaded(place.model), c)
        for _, module in adapters(learner.model):
            module.lora_b = mx.ones(module.lora_b.shape) * 0.02
        if again:
            recompute_layers(learner)
        learner.train()
        mx.random.seed(5)
        _, gradients = nn.value_and_grad(learner, learner.loss)(PICTURE)
        by_name.append(dict(tree_flatten(gradients)))
    for name, plain in by_name[0].items():
        np.testing.assert_allclose(by_name[1][name], plain, rtol=1e-4, atol=1e-4)


NAME = "language.layers.0.self_attn.q_proj.lora_a"


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_loaded_says_what_was_trained(place, tmp_path, stage):
    c = config(stage, "x", tmp_path / "a", unfreeze=["projector"])
    learner = trained(loaded(place.model), c)
    learner.save_adapters(tmp_path / "a", 3)
    model, _ = load(place.model, adapter_path=tmp_path / "a", dtype="float32")
    np.testing.assert_array_equal(logits(model, PICTURE), logits(learner.model, PICTURE))
    base = logits(loaded(place.model), PICTURE)
    assert np.abs(logits(model, PICTURE) - base).max() > 0.1


def test_generate_takes_adapters_from_the_command_line_and_from_python(place, tmp_path, capsys):
    picture = place.data / "0.png"
    common = ["--model", str(place.model), "--image", str(picture), "--prompt", "what is @ ?"]
    common += ["--json", str(tmp_path / "a.json"), "--max-tokens", "4"]
    generate_main([*common, "--adapter-path", str(place.adapters)])
    answer = json.loads((tmp_path / "a.json").read_text())
    model, processor = load(place.model, adapter_path=place.adapters)
    again = generate(model, processor, "what is @ ?", picture, max_tokens=4)
    assert answer["text"] == again.text
    assert processor.folder is None


def test_keys_name_modules_as_in_mlx_lm(place):
    model = loaded(place.model)
    keys = ["self_attn.v_proj", "embed_tokens"]
    add_adapters(model, AdapterConfig.of("lora", 1, {"keys": keys, "rank": 3}))
    names = [name for name, _ in adapters(model)]
    assert sorted(names) == ["language.embed_tokens", "language.layers.2.self_attn.v_proj"]
    assert adapter_arrays(model)["language.embed_tokens.lora_b"].shape == (3, tiny.TEXT.hidden_size)


REFUSED = {
    "keys of lora_parameters names 'self_attn.wq'": {"keys": ["self_attn.wq"]},
    "has alpha; mlx-lm's key is scale, alpha ÷ rank": {"rank": 8, "alpha": 16},
    "lora_parameters has 'r'; it may have rank, scale, dropout or keys": {"r": 8},
    "rank of lora_parameters is inf; it must be a whole number of at least 1": {"rank": INFINITE},
    "scale of lora_parameters is inf; it must be a number": {"scale": INFINITE},
    "rank of lora_parameters is 0; it must be a whole number of at least 1": {"rank": 0},
    "dropout of lora_parameters is 1.0; it must be at least 0 and below 1": {"dropout": 1.0},
    "keys of lora_parameters must be a list of modules' names": {"keys": "self_attn.q_proj"},
}


@pytest.mark.parametrize("fault", REFUSED)
def test_parameters_that_would_do_nothing_or_something_else_are_refused(place, fault):
    with pytest.raises(UserError) as refusal:
        LEARNERS["lora"](
            loaded(place.model), config("lora", "x", "y", lora_parameters=REFUSED[fault])
        )
    assert fault in str(refusal.value)


@pytest.mark.parametrize(
    "keys", [{"num_layers": 0}, {"freeze": ["language"]}, {"unfreeze": ["tower"]}]
)
def test_a_stage_that_would_learn_nothing_or_more_is_refused(place, keys):
    with pytest.raises(UserError, match=r"num_layers is 0|freeze names language|names tower"):
        LEARNERS["lora"](loaded(place.model), config("lora", "x", "y", **keys))


MISFITS = {
    "rank": ({"lora_parameters": {"rank": 4, "scale": 20.0, "dropout": 0.0}}, "lora_a is"),
    "fewer layers": ({"num_layers": 1}, "layers.0.*and none in the model"),
    "dora": ({"fine_tune_type": "dora"}, "down_proj.m is none in the file"),
    "keys": ({"lora_parameters": {"rank": 8, "keys": ["attn.qkv"]}}, "names 'attn.qkv'"),
    "kind": ({"fine_tune_type": "full"}, "fine_tune_type is 'full'; it must be lora or dora"),
    "peft": ({"peft_type": "LORA"}, "is peft's"),
    "no layers": ({"num_layers": "all"}, "num_layers is 'all'; it must be -1 or at least 1"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_adapters_that_do_not_fit_the_model_are_refused_in_one_sentence(place, tmp_path, misfit):
    changes, fault = MISFITS[misfit]
    values = json.loads((place.adapters / "adapter_config.json").read_text()) | changes
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    weights = (place.adapters / "adapters.safetensors").read_bytes()
    (tmp_path / "adapters.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match=fault) as refusal:
        load(place.model, adapter_path=tmp_path)
    assert "\n" not in str(refusal.value)


def test_adapters_of_another_model_and_a_folder_without_any_are_refused(place, tmp_path):
    with pytest.raises(UserError, match="do not fit this model"):
        load(adapter_path=place.adapters)
    with pytest.raises(UserError, match="there is no folder"):
        load(place.model, adapter_path=tmp_path / "none")
    with pytest.raises(UserError, match=r"cannot read .*adapter_config.json"):
        load(place.model, adapter_path=tmp_path)


@pytest.mark.parametrize("kind", backbones.KINDS)
def test_every_language_model_of_mlx_lms_learns(kind, tmp_path):
    model, _ = load(backbones.write(kind, tmp_path / "hf"), dtype="float32")
    read = batch([llava.prompt(1)], 2, model.config.vision.image_size)
    start, before = logits(model, read), bits(model)
    c = config("lora", "x", tmp_path / "a", learning_rate=1e-3)
    learner = LEARNERS["lora"](model, c)
    learner.eval()
    np.testing.assert_array_equal(logits(model, read), start)
    loss = float(learner.loss(read))
    learner.train()
    step(learner, AdamW(1e-3), read)
    learner.eval()
    assert float(learner.loss(read)) < loss
    moved = {name for name, x in adapter_arrays(model).items() if float(mx.abs(x).max()) > 0}
    assert moved == adapter_arrays(model).keys()
    after = {name.replace(".linear.", "."): x for name, x in bits(model).items()}
    assert all(after[name] == before[name] for name in before)


@pytest.mark.parametrize("length", [GATHERED // 2, GATHERED + 5])
def test_experts_learn_and_the_two_ways_through_them_agree(tmp_path, length):
    from . import generations
    from .test_generations import converted

    folder = converted(generations.release("minimind-3v", True), tmp_path)
    model = loaded(folder)
    add_adapters(model, AdapterConfig.of("lora", -1, {"rank": 2, "scale": 2.0}))
    linear = model.language.layers[0].mlp.experts.gate_proj
    linear.lora_b = mx.random.normal(linear.lora_b.shape)
    x_RD = mx.random.normal((length, model.config.text.hidden_size))
    expert_R = mx.arange(length) % len(linear.lora_a)
    y_RD = linear(x_RD[:, None], expert_R)[:, 0]
    fused = linear.fuse()
    for r in range(length):
        one = linear.one_expert(x_RD[r : r + 1], int(expert_R[r]))
        np.testing.assert_allclose(one[0], y_RD[r], rtol=1e-4, atol=1e-4)
        whole = fused.one_expert(x_RD[r : r + 1], int(expert_R[r]))
        np.testing.assert_allclose(one, whole, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="to which dora adds no adapter"):
        keys = {"keys": ["mlp.experts.gate_proj"]}
        add_adapters(loaded(folder), AdapterConfig.of("dora", -1, keys))


def test_layers_are_those_of_mlx_lm(place):
    for stage, kind in (("lora", LoRALinear), ("dora", DoRALinear)):
        model = LEARNERS[stage](loaded(place.model), config(stage, "x", "y")).model
        assert {type(module) for _, module in adapters(model)} == {kind}


def test_words_alone_teach_as_well(place):
    words = batch([without_images(tiny.row("what is # the sign ?"))], 2, 64)
    learner = trained(loaded(place.model), config("lora", "x", "y"), words, steps=2)
    assert np.isfinite(float(learner.loss(words)))
