"""Promises of what a run leaves: a model folder like any other, whole, and back to where it was."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from convert.__main__ import main as convert
from mlx_vlm_prune import generate
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.checkpoints.families import read_checkpoint
from mlx_vlm_prune.checkpoints.reading.files import open_safetensors
from mlx_vlm_prune.hosts.loading import load
from mlx_vlm_prune.scenes import compose
from mlx_vlm_prune.scenes.vocabulary import write as write_words
from mlx_vlm_prune.training.config import TrainConfig
from mlx_vlm_prune.training.run import train
from mlx_vlm_prune.training.run_state import checkpoint_folders
from tests import backbones, llava, stage_runs, tiny

POOL = {"pruner": "attention_pool", "keep_tokens": 5}
QUESTION = stage_runs.QUESTION


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A tiny MiniMind-V in float16, and beside its folder the published files."""
    folder = tmp_path_factory.mktemp("plain")
    model = tiny.reference()
    pth, clip = tiny.publish(model, folder, torch.float16)
    write_words(folder / "words")
    convert(["to-mlx", str(pth), str(folder / "mlx"), "--vision", str(clip),
             "--tokenizer", str(folder / "words")])  # fmt: skip
    return folder / "mlx"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return stage_runs.write(tmp_path_factory.mktemp("data"), 4)


@pytest.fixture(scope="module")
def pooled(plain, data, tmp_path_factory):
    """What a run with an untrained pool leaves."""
    out = tmp_path_factory.mktemp("pooled") / "out"
    train(stage_runs.config("sft", plain, data, out, **POOL))
    return out


def files(folder) -> list:
    """A model's own."""
    names = ("*.safetensors", "config.json", "tokenizer*", "preprocessor*", "README.md")
    return [file for name in names for file in folder.glob(name)]


def answer(folder, **options) -> str:
    model, processor = load(str(folder))
    return generate(model, processor, QUESTION, compose(0).image(), max_tokens=3, **options).text


def test_a_trained_pool_lies_in_the_model_and_refuses_another_k(pooled, data, tmp_path):
    assert json.loads((pooled / "config.json").read_text())["pruner"]["tokens"] == 5
    assert not (pooled / "pruners.safetensors").exists()
    answer(pooled, pruner="attention_pool")
    with pytest.raises(UserError, match="was trained for 5 visual tokens; it cannot keep 6"):
        answer(pooled, pruner="attention_pool", keep_tokens=6)
    again = stage_runs.config("sft", pooled, data, tmp_path / "o", **POOL | {"keep_tokens": 6})
    with pytest.raises(UserError, match="was trained for 5 visual tokens; it cannot keep 6"):
        train(again)
    train(stage_runs.config("pruner", pooled, data, tmp_path / "out", pruner="attention_pool"))
    before, after = (read_checkpoint(f).tensors for f in (pooled, tmp_path / "out"))
    changed = {name.split(".")[0] for name in after if after[name] != before[name]}
    assert changed == {"pruner"}


def test_a_trained_folder_goes_to_pth_and_hugging_face_and_back(pooled, tmp_path):
    convert(["to-torch", str(pooled), str(tmp_path / "x.pth"), "--vision", str(tmp_path / "clip")])
    state = torch.load(tmp_path / "x.pth")
    assert state["vision_proj.pool_queries"].shape == (5, 32)  # as EfficientVLM has it
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    convert(["to-mlx", str(tmp_path / "x.pth"), str(tmp_path / "back"),
             "--vision", str(tmp_path / "clip"), "--tokenizer", str(pooled)])  # fmt: skip
    assert read_checkpoint(tmp_path / "back").tensors == read_checkpoint(pooled).tensors
    convert(["to-hf", str(pooled), str(tmp_path / "hf")])
    there = load_file(tmp_path / "hf/model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert there.equal(state["model.layers.0.mlp.up_proj.weight"])


def test_it_is_in_the_checkpoints_dtype_unless_told_another(pooled, plain, data, tmp_path):
    def dtypes(folder):
        return {tensor.dtype for tensor in read_checkpoint(folder).tensors.values()}

    assert dtypes(pooled) == {"F16"}  # trained in float32, as all on a CPU
    train(stage_runs.config("pretrain", plain, data, tmp_path / "out", dtype="bfloat16"))
    assert dtypes(tmp_path / "out") == {"BF16"}
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_finished_run_writes_its_model_again(plain, data, tmp_path):
    config = stage_runs.config("pretrain", plain, data, tmp_path / "out")
    train(config)
    before = (tmp_path / "out/model.safetensors").read_bytes()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "out" / name).unlink()
    train(stage_runs.config("pretrain", plain, data, tmp_path / "out", resume=True))
    assert (tmp_path / "out/model.safetensors").read_bytes() == before


@pytest.mark.parametrize("moment", ["write_safetensors", "Path.replace"])
def test_a_model_is_written_whole_or_not_at_all(plain, data, tmp_path, monkeypatch, moment):
    out = tmp_path / "out"
    train(stage_runs.config("pretrain", plain, data, out))
    before = {f.name: f.read_bytes() for f in files(out)}
    if moment == "write_safetensors":

        def full(*arguments):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("mlx_vlm_prune.checkpoints.writing.write_safetensors", full)
        with pytest.raises(UserError, match="No space left on device"):
            train(stage_runs.config("pretrain", plain, data, out, resume=True, iters=4))
        now = {f.name: f.read_bytes() for f in files(out)}
        assert now == before
        monkeypatch.undo()
    else:
        from mlx_vlm_prune.training import save_model

        real = save_model.Path.replace

        def stopped(self, target):
            if self.parent.parent.name == ".model" and self.name.startswith("t"):
                raise KeyboardInterrupt
            return real(self, target)

        monkeypatch.setattr(save_model.Path, "replace", stopped)
        with pytest.raises(KeyboardInterrupt):
            train(stage_runs.config("pretrain", plain, data, out, resume=True, iters=4))
        monkeypatch.undo()
        with pytest.raises(UserError):
            load(str(out))
    train(stage_runs.config("pretrain", plain, data, out, resume=True, iters=4))
    load(str(out))
    assert not list(out.glob(".model*"))


def test_a_resumed_run_of_a_pruner_is_the_same_bit_for_bit(plain, data, tmp_path):
    keys = {"pruner": "mlp", "keep_tokens": 5, "save_every": 1, "seed": 4}
    for name, iters in (("whole", [4]), ("parts", [2, 4])):
        for most in iters:
            c = stage_runs.config("pruner", plain, data, tmp_path / name, iters=4, **keys)
            if most == 4:
                train(TrainConfig.of({**vars(c), "resume": True, "freeze": None,
                                      "unfreeze": None, "epochs": None}, "x"))  # fmt: skip
            else:
                _stop_after(c, most)
    whole, parts = (open_safetensors(tmp_path / n / "pruners.safetensors") for n in
                    ("whole", "parts"))  # fmt: skip
    assert whole.keys() == parts.keys() and "mlp.mean_need" in whole
    assert all(whole[name] == parts[name] for name in whole)


def _stop_after(config, steps):
    """A run that ends with the checkpoint of a step."""
    from mlx_vlm_prune.training.processes import Processes
    from mlx_vlm_prune.training.run import make_trainer
    from mlx_vlm_prune.training.run_folder import claimed

    with claimed(config), pytest.raises(KeyboardInterrupt):
        trainer = make_trainer(config, Processes())
        trainer.on_step = lambda seconds: setattr(
            trainer.stop, "is_requested", trainer.progress.iteration >= steps
        )
        trainer.run()


def test_a_stop_during_an_evaluation_keeps_the_steps_before_it(plain, data, tmp_path):
    from mlx_vlm_prune.training.processes import Processes
    from mlx_vlm_prune.training.run import make_trainer

    config = stage_runs.config("sft", plain, data, tmp_path / "out", iters=4, save_every=4)
    trainer = make_trainer(config, Processes())

    def stopped_behind_step_2() -> None:
        trainer.stop.is_requested = trainer.progress.iteration == 2

    trainer._evaluate_if_due = stopped_behind_step_2
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert [path.name for path in checkpoint_folders(config.folder)] == ["0000002"]


def test_a_minimind_begins_from_a_language_models_weights_and_a_tower(plain, data, tmp_path):
    """EfficientVLM's --from llm_512.pth."""
    state = torch.load(plain.parent / "published.pth")
    language = {k: v for k, v in state.items() if not k.startswith("vision_proj.")}
    torch.save(language, tmp_path / "llm_512.pth")
    keys = {"tower": str(plain.parent / "clip"), "tokenizer": str(plain.parent / "words")}
    llm, out = tmp_path / "llm_512.pth", tmp_path / "out"
    with pytest.raises(UserError, match="cannot see; to train it to, give tower"):
        convert_or_raise(llm, tmp_path / "no", plain)
    train(stage_runs.config("pretrain", llm, data, out, **keys, **POOL))
    before, after = read_checkpoint(plain).tensors, read_checkpoint(out).tensors
    same = {name for name in before if after[name] == before[name]}
    assert {name for name in before if name not in same} == {
        "projector.weight", "projector.bias",
    }  # fmt: skip
    assert {name.split(".")[0] for name in after.keys() - before.keys()} == {"pruner"}
    answer(out, pruner="attention_pool")
    # Through convert the same projector, of the same seed.
    paths = ["--vision", str(plain.parent / "clip"), "--tokenizer", str(plain.parent / "words")]
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        convert(["to-mlx", str(llm), str(tmp_path / name), *paths, "--projector-seed", seed])
    a, b, c = (read_checkpoint(tmp_path / name).tensors for name in "abc")
    assert a == b and a["projector.weight"] != c["projector.weight"]
    most = np.abs(a["projector.weight"].floats()).max()
    assert 0.9 * 32**-0.5 < most <= 32**-0.5 + 1e-3
    train(stage_runs.config("pretrain", tmp_path / "a", data, tmp_path / "o", **POOL))
    assert read_checkpoint(tmp_path / "o").tensors == after


def convert_or_raise(source, target, plain):
    from convert.__main__ import build_parser, run

    run(build_parser().parse_args(
        ["to-mlx", str(source), str(target), "--vision", str(plain.parent / "clip"),
         "--tokenizer", str(plain.parent / "words")]
    ))  # fmt: skip


@pytest.mark.parametrize("original", [False, True])
def test_a_llava_comes_back_as_it_was_published(data, tmp_path, original):
    source, out = tmp_path / "llava", tmp_path / "out"
    model = llava.random_model("vicuna, heads as wide as OpenAI's" if original else "vicuna")
    if original:
        llava.write_original(model, source, inside=True)
    else:
        llava.write(model, source)
    train(stage_runs.config("pretrain", source, data, out, **POOL))
    assert "attention_pool.queries" in open_safetensors(out / "pruners.safetensors")
    before, after = read_checkpoint(source).tensors, read_checkpoint(out).tensors
    changed = {name.split(".")[0] for name in after if after[name] != before[name]}
    assert changed == {"projector"} and before.keys() == after.keys()
    answer(out, pruner="attention_pool")
    with pytest.raises(UserError, match="was trained for 5 visual tokens; it cannot keep 6"):
        answer(out, pruner="attention_pool", keep_tokens=6)
    convert(["to-torch", str(out), str(tmp_path / "back")])
    assert read_checkpoint(tmp_path / "back").tensors == after


def test_lightvlms_scorer_learns_on_phi(data, tmp_path):
    """CLIP and Phi-2's shape, its language model mlx-lm's."""
    source, out = tmp_path / "phi", tmp_path / "out"
    backbones.write("phi", source)
    train(stage_runs.config("pruner", source, data, out, pruner="mlp", keep_tokens=5))
    before, after = read_checkpoint(source).tensors, read_checkpoint(out).tensors
    assert before == after
    assert "mlp.fc1.weight" in open_safetensors(out / "pruners.safetensors")
    answer(out, pruner="mlp:dynamic=true", keep_tokens=5)
    train(stage_runs.config("sft", source, data, tmp_path / "sft", language_layers=1))
    answer(tmp_path / "sft")
    with pytest.raises(UserError, match="a twig does not grow on a language model of mlx-lm's"):
        train(stage_runs.config("twig", source, data, tmp_path / "twig"))


def test_a_quantized_language_model_stays_and_its_projector_learns(data, tmp_path):
    source = tmp_path / "llava"
    llava.write(llava.random_model(), source)
    small = tmp_path / "small"
    convert(["to-mlx", str(source), str(small), "-q", "--q-group-size", "32"])
    for stage, keys, sentence in (
        ("sft", {}, "train adapters"), ("pretrain", {"language_layers": 1}, "train adapters"),
        ("twig", {"twig_layer": 1, "twig_layers": 1}, "quantized"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=sentence):
            train(stage_runs.config(stage, small, data, tmp_path / "no", **keys))
    train(stage_runs.config("sft", small, data, tmp_path / "out", freeze="language"))
    before, after = (read_checkpoint(f).tensors for f in (small, tmp_path / "out"))
    changed = {name.split(".")[0] for name in after if after[name] != before[name]}
    assert changed == {"projector"}
    answer(tmp_path / "out")


def test_a_mixture_of_experts_learns_and_comes_back(data, tmp_path):
    from tests import generations
    from tests.test_generations import converted

    (tmp_path / "moe").mkdir()
    folder = converted(generations.release("minimind-3v", True), tmp_path / "moe")
    train(stage_runs.config("sft", folder, data, tmp_path / "out"))
    before, after = read_checkpoint(folder).tensors, read_checkpoint(tmp_path / "out").tensors
    assert before.keys() == after.keys()
    changed = [name for name in after if after[name] != before[name]]
    assert any(".experts." in name for name in changed)
    keys = {"twig_layer": 1, "twig_layers": 1}
    train(stage_runs.config("twig", tmp_path / "out", data, tmp_path / "twig", **keys))
    answer(tmp_path / "twig", num_draft_tokens=2)


def test_a_learned_method_of_ones_own_learns_by_the_contract(plain, data, tmp_path, monkeypatch):
    """One file with weights and a `prune` that has gradients, or a `training_factor`."""
    from mlx import nn

    from mlx_vlm_prune.pruners import METHODS, Reduction, Stage, register_pruner
    from mlx_vlm_prune.pruners.method import Method
    from mlx_vlm_prune.pruners.numerics import keep_highest
    from mlx_vlm_prune.pruners.scorer import straight_through

    class Weights(nn.Linear):
        def prune(self, signals, K):
            return Reduction(index_BK=keep_highest(self(signals.x_BND)[..., 0], K))

    def make_weights(dims: int, tokens: int) -> Weights:
        return Weights(dims, 1)

    def training_factor(weights, signals, K, noise):
        return straight_through(weights(signals.x_BND)[..., 0], K, noise)

    monkeypatch.setitem(METHODS, "dummy", None)
    METHODS.pop("dummy")
    register_pruner(
        Method("mine", "My own.", Stage.FEATURES, learned=True, make_weights=make_weights,
               training_factor=training_factor)
    )  # fmt: skip
    try:
        out = tmp_path / "out"
        train(stage_runs.config("pruner", plain, data, out, pruner="mine", keep_tokens=4))
        assert set(open_safetensors(out / "pruners.safetensors")) == {"mine.weight", "mine.bias"}
        answer(out, pruner="mine", keep_tokens=4)
    finally:
        METHODS.pop("mine", None)
