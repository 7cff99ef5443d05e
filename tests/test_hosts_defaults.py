"""Methods' defaults in mlx-vlm's families, as their authors have them there."""

import json
from dataclasses import replace
from functools import wraps
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")
from mlx_vlm.utils import load_model

from mlx_vlm_prune import generate, load, pruned
from mlx_vlm_prune.evaluation.host_answers import PreparedHostQuestion
from mlx_vlm_prune.hosts.families import FAMILIES
from mlx_vlm_prune.hosts.families.pruner_defaults import PRUNER_DEFAULTS, with_family_defaults
from mlx_vlm_prune.hosts.pruned_folder import prune_into
from mlx_vlm_prune.pruners import METHODS, plan
from mlx_vlm_prune.training.processes import Processes
from mlx_vlm_prune.training.run import make_trainer

from . import host_folders, into_folders
from .host_models import KINDS
from .test_hosts_evaluate import evaluated
from .training_data import config

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own
SHARP = [("llava", 0.02), ("qwen2_vl", 0.02), ("qwen2_5_vl", 0.01)]


def test_the_table_names_families_methods_and_options_that_exist():
    for kind, defaults in PRUNER_DEFAULTS.items():
        assert kind in FAMILIES
        for name, options in defaults.items():
            known = METHODS[name].options
            assert {type(known[option]) for option in options} == {*map(type, options.values())}


@pytest.mark.parametrize(
    "kind, spec, depth, layer",
    [
        ("llava", "hiprune", 24, 8),
        ("qwen2_5_vl", "hiprune", 32, 15),
        ("qwen2_5_vl", "hiprune:objects=0.2", 32, 15),
        ("qwen2_5_vl", "hiprune:object_layer=0.33", 32, 11),
        ("qwen2_5_vl", "hiprune+fastv", 32, 15),
    ],
)
def test_hiprunes_objects_are_those_of_its_authors_layer(kind, spec, depth, layer):
    pipeline = with_family_defaults(plan(spec), kind)
    assert pipeline.signal_layers(depth)["object_attention"] == layer
    assert pipeline.spec == plan(spec).spec  # as it was typed


def test_v2drops_cuts_in_qwen2_vl_are_those_of_its_authors():
    """xuyang-liu16/V2Drop@219e03e: 3, 16 and 22 of 28."""
    for kind, layers, cuts in (("qwen2_vl", 28, [3, 16, 22]), ("llava", 32, [3, 17, 22])):
        step = with_family_defaults(plan("v2drop"), kind).decoder
        assert list(step.call(step.method.schedule, layers, 64, 20)) == cuts
    step = with_family_defaults(plan("v2drop:first=5"), "qwen2_vl").decoder
    assert list(step.call(step.method.schedule, 28, 64, 20)) == [5, 16, 22]


def test_a_level_of_grey_is_that_of_the_processor():
    """Of a LLaVA with SigLIP, whose family says nothing, too."""
    image = SimpleNamespace(image_std=[0.5, 0.5, 0.5])
    processor = SimpleNamespace(image_processor=image)
    step = with_family_defaults(plan("docprune"), "llava", processor).steps[0]
    assert step.defaults == {"level": 1 / 255 / 0.5}
    image.image_std = [0.225, 0.225, 0.225]
    step = with_family_defaults(plan("docprune:level=0.1"), "gemma3", processor).steps[0]
    assert step.options_for(step.method.prune)["level"] == 0.1
    assert step.defaults["level"] == pytest.approx(1 / 255 / 0.225)


def test_vscans_layers_in_qwen_are_those_of_its_authors():
    """Tencent/SelfEvolvingAgent@a82450e: the first block that attends to all, and the last."""
    layers = with_family_defaults(plan("global_local"), "qwen2_5_vl").signal_layers(32)
    assert layers == {"local_attention": 7, "cls_attention": 31}


@pytest.fixture
def sharpness(monkeypatch):
    """What `mmtok` is called with, one number a call."""
    method, values = METHODS["mmtok"], []

    @wraps(method.prune)
    def prune(signals, K, **options):
        values.append(options.get("sharp", method.options["sharp"]))
        return method.prune(signals, K, **options)

    monkeypatch.setitem(METHODS, "mmtok", replace(method, prune=prune))
    return values


@pytest.mark.parametrize("kind, sharp", SHARP)
def test_a_block_takes_the_familys_default_where_none_is_given(sharpness, kind, sharp):
    model = KINDS[kind].make()
    inputs = KINDS[kind].inputs(model, 1)
    for spec in ("mmtok", "mmtok:sharp=0.3"):
        with pruned(model, spec, keep_ratio=0.5) as report:
            model.get_input_embeddings(
                mx.array(inputs.ids)[None], inputs.pixels, mask=inputs.mask_1L, **inputs.extra
            )
        assert report.pruner == spec
    assert sharpness == [sharp, 0.3]


@pytest.mark.parametrize("kind, sharp", SHARP)
def test_so_does_an_evaluation(sharpness, kind, sharp):
    model = KINDS[kind].make()
    host = evaluated(model, "mmtok")
    batch = host.make_batch([PreparedHostQuestion(KINDS[kind].inputs(model, 1), [7, 3, 63])])
    for spec in ("mmtok", "mmtok:sharp=0.3"):
        host.answer(batch, plan(spec), 0.5, 1)
    assert sharpness == [sharp, 0.3]


@pytest.mark.parametrize("kind, sharp", [SHARP[0], SHARP[2]])
def test_so_does_an_answer(sharpness, tmp_path, kind, sharp):
    picture = host_folders.picture(tmp_path, "a.png", 80, 90)
    model, processor = load(host_folders.checkpoint(kind, tmp_path))
    for spec in ("mmtok", "mmtok:sharp=0.3"):
        generate(model, processor, "w7 w9", [picture], pruner=spec, keep_ratio=0.5, max_tokens=1)
    assert sharpness == [sharp, 0.3]


@pytest.mark.parametrize("kind, sharp", [SHARP[0], SHARP[2]])
def test_so_does_a_written_folder(sharpness, tmp_path, kind, sharp):
    into_folders.checkpoint(kind, tmp_path)
    for spec in ("mmtok", "mmtok:sharp=0.3"):
        folder = tmp_path / spec
        prune_into(tmp_path / kind, folder, spec, keep_ratio=0.5)
        model = load_model(folder)
        into_folders.answer(kind, model, into_folders.inputs_of(kind, model, 1))
    assert {*sharpness} == {sharp, 0.3} and sharpness[0] == sharp


def test_so_does_training(sharpness, tmp_path):
    host_folders.desk(tmp_path, ["qwen2_5_vl"])
    line = json.dumps({"image": "a.png", "question": "w7 w9", "answer": "w20"})
    (tmp_path / "train.jsonl").write_text("\n".join([line] * 2))
    for spec in ("mmtok", "mmtok:sharp=0.3"):
        c = config(
            "lora", tmp_path / "train.jsonl", tmp_path / "out", model=str(tmp_path / "qwen2_5_vl"),
            dtype="float32", num_layers=2, pruner=spec, keep_ratio=0.5,
        )  # fmt: skip
        trainer = make_trainer(c, Processes())
        float(trainer.learner.loss(trainer.data.batch(np.arange(2))))
    assert {*sharpness} == {0.01, 0.3} and sharpness[0] == 0.01


def test_an_evaluations_tower_reads_the_familys_layers(monkeypatch):
    monkeypatch.setitem(PRUNER_DEFAULTS, "qwen2_5_vl", {"hiprune": {"object_layer": 2.0}})
    layers = {
        kind: evaluated(KINDS[kind].make(), "hiprune").want["object_attention"]
        for kind in ("qwen2_vl", "qwen2_5_vl")
    }
    assert layers == {"qwen2_vl": 1, "qwen2_5_vl": 2}
