"""Promises of training's settings: every key has a flag and a comment; mistakes are refused."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.train import build_parser
from mlx_vlm_prune.training.config import DEFAULTS, STAGES, TrainConfig, read_yaml
from mlx_vlm_prune.training.optimizer import make_optimizer
from mlx_vlm_prune.training.options import FILE_ONLY, GROUPS, config_of
from mlx_vlm_prune.training.run import train
from mlx_vlm_prune.training.summary import usage

from . import stage_runs

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "docs/train.yaml"
KEYS = [field.name for field in fields(TrainConfig)]


def parsed(*arguments: str) -> TrainConfig:
    return config_of(build_parser().parse_args(arguments))


def test_the_example_has_every_key_explains_each_and_loads_as_the_defaults():
    assert set(read_yaml(EXAMPLE)) == set(KEYS)
    assert parsed("-c", str(EXAMPLE)) == TrainConfig.of(
        {"stage": "sft", "data": "data", "optimizer_config": {"weight_decay": 0.01}}, "here"
    )
    paragraphs = re.split(r"\n\n", EXAMPLE.read_text(encoding="utf-8"))
    assert all(paragraph.startswith("# ") for paragraph in paragraphs)


def test_the_recipe_of_score_prune_loads():
    config = parsed("-c", str(ROOT / "docs/score_prune.yaml"), "--data", "d")
    assert (config.stage, config.pruner, config.reset_pruner) == ("pruner", "score_prune", True)
    assert (config.keep_tokens, config.iters, config.batch_size) == (49, 600, 16)
    assert make_optimizer(config).learning_rate.item() < 2e-3  # the schedule warms up


def test_the_recipe_of_a_new_kind_of_question_loads():
    config = parsed("-c", str(ROOT / "docs/new_question.yaml"), "--data", "d")
    assert (config.stage, config.iters, config.batch_size) == ("lora", 480, 8)


def test_every_key_has_a_flag_in_a_group_or_stands_in_the_file_alone():
    assert sorted(key for texts in GROUPS.values() for key in texts) == sorted(KEYS)
    assert set(build_parser().flags) - {"config"} == set(KEYS) - set(FILE_ONLY)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_has_its_defaults_and_help_says_them(stage):
    more = ["--pruner", "mlp"] if stage == "pruner" else []
    config = parsed("--stage", stage, "--data", "d", *more)
    text = " ".join(build_parser().format_help().split())
    for key, value in DEFAULTS[stage].items():
        assert getattr(config, key) == value
        assert f"{value:g} in {stage}" in text, key


def test_a_flag_overrides_its_key_and_the_key_that_excludes_it(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(
        "{stage: sft, data: d, epochs: 2, batch_size: 3, pruner: norm, keep_ratio: 0.5,"
        " learning_rate: 1e-3, skip_bad: true}"
    )
    config = parsed("-c", str(file), "--iters", "7", "--keep-tokens", "9", "--no-skip-bad")
    assert (config.iters, config.epochs) == (7, None)
    assert (config.keep_tokens, config.keep_ratio) == (9, None)
    assert (config.batch_size, config.learning_rate, config.skip_bad) == (3, 1e-3, False)
    file.write_text("{stage: sft, data: d, lr_schedule: {name: cosine_decay, arguments: [1, 9]}}")
    config = parsed("-c", str(file), "--learning-rate", "1e-4")
    assert (config.learning_rate, config.lr_schedule) == (1e-4, None)


MISTAKES = {
    "unknown": ({"learn_rate": 1}, "there is no key 'learn_rate'; did you mean learning_rate, "),
    "stage": ({"stage": "rl"}, "stage is 'rl'; it must be pretrain, sft, lora, dora, pruner or"),
    "no data": ({"data": None}, "data is missing: a file, or a folder with train"),
    "no stage": ({"stage": None}, "stage is missing: pretrain, sft, lora, dora, pruner or twig"),
    "type": ({"batch_size": "many"}, "batch_size is 'many'; it must be a whole number"),
    "fraction": ({"iters": 1.5}, "iters is 1.5; it must be a whole number"),
    "number": ({"grad_clip": True}, "grad_clip is True; it must be a number"),
    "nan": ({"learning_rate": float("nan")}, "learning_rate is nan; it must be a number"),
    "infinite": ({"learning_rate": float("inf")}, "learning_rate is inf"),
    "flag": ({"skip_bad": "yes"}, "skip_bad is 'yes'; it must be true or false"),
    "text": ({"output": 3}, "output is 3; it must be a text"),
    "list": ({"freeze": [1]}, r"freeze is \[1\]; it must be a list of texts"),
    "freeze": ({"freeze": "eyes"}, "freeze names 'eyes'; it may name tower, projector"),
    "table": ({"lora_parameters": 8}, "lora_parameters is 8; it must be keys and values"),
    "zero": ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
    "none left": ({"epochs": -1}, "epochs is -1.0; it must be above 0"),
    "rate": ({"learning_rate": 0}, "learning_rate is 0.0; it must be above 0"),
    "both": ({"iters": 1, "epochs": 1}, "give iters or epochs, not both"),
    "budgets": ({"pruner": "norm", "keep_ratio": 0.5, "keep_tokens": 9}, "keep_ratio or keep_tok"),
    "ratio": ({"pruner": "norm", "keep_ratio": 2}, "keep_ratio is 2.0; it must be above 0 and at"),
    "no pruner": ({"keep_tokens": 9}, "keep_tokens needs pruner"),
    "noise": ({"noise": 0.5}, "noise needs pruner, the learned method"),
    "pruner": ({"stage": "pruner"}, "stage pruner needs pruner, the learned method"),
    "optimizer": ({"optimizer": "adm"}, "optimizer is 'adm'; it must be adam, adamw, muon, sgd"),
    "reports": ({"report_to": "mail"}, "report_to names 'mail'; it may name wandb or swanlab"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_setting_that_no_run_can_have_is_refused_in_a_sentence(case):
    values, sentence = MISTAKES[case]
    with pytest.raises(UserError, match=sentence) as error:
        TrainConfig.of({"stage": "sft", "data": "d", **values}, "c.yaml")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("stage", "key", "value"),
    [
        ("sft", "twig_layer", 1), ("lora", "twig_layers", 2), ("sft", "num_layers", 4),
        ("twig", "lora_parameters", {"rank": 4}), ("dora", "noise", 0), ("twig", "noise", 0),
        ("twig", "language_layers", 1), ("lora", "language_layers", 1),
        ("twig", "unfreeze", "tower"),
    ],
)  # fmt: skip
def test_a_key_of_another_stage_is_refused_unless_it_is_at_its_default(stage, key, value):
    values = {"stage": stage, "data": "d"}
    with pytest.raises(UserError, match=f"{key} has no effect in stage {stage}; leave it out"):
        TrainConfig.of({**values, key: value}, "c.yaml")
    config = TrainConfig.of(values, "c.yaml")
    assert TrainConfig.of({**values, key: getattr(config, key)}, "c.yaml") == config


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("stage: [", "is not valid YAML"),
        ("- sft", "must hold keys and values"),
        (None, "cannot read"),
    ],
)
def test_a_config_file_that_cannot_be_read_is_refused(tmp_path, text, sentence):
    file = tmp_path / "c.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=sentence):
        read_yaml(file)


def test_the_command_that_uses_a_run_is_quoted():
    keys = {
        "stage": "lora",
        "data": "d",
        "model": "my model",
        "adapter_path": "a b",
        "resume": True,
    }
    line = usage(TrainConfig.of(keys, "the test"))
    assert "--model 'my model' --adapter-path 'a b'" in line


def test_a_model_of_mlx_vlms_is_refused_in_a_sentence(tmp_path):
    (tmp_path / "qwen").mkdir()
    (tmp_path / "qwen/config.json").write_text('{"model_type": "qwen2_5_vl"}')
    data, keys = stage_runs.write(tmp_path, 1), {"pruner": "attention_pool", "keep_tokens": 5}
    with pytest.raises(UserError, match="mlx-vlm's, in which the stages lora, dora, pruner learn"):
        train(stage_runs.config("sft", tmp_path / "qwen", data, tmp_path / "out", **keys))
