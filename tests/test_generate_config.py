"""Promises of `--config` of `generate` and `chat`: a training file asks what it trains."""

import json
import shutil
from pathlib import Path

import pytest

from mlx_vlm_prune.generate import main
from mlx_vlm_prune.generation.arguments import build_chat_parser, build_parser
from mlx_vlm_prune.scenes import CHECKPOINT, compose
from mlx_vlm_prune.training.config import TrainConfig, read_yaml
from mlx_vlm_prune.training.generate_options import apply_config, generate_options

DOCS = Path(__file__).resolve().parents[1] / "docs"
PRUNER = "stage: pruner\npruner: mlp\nkeep_tokens: 49\noutput: trained-mlp\nmodel: base\n"
LORA = "stage: lora\nmodel: base\nadapter_path: my-adapters\nchat_template_config: {a: true}\n"


def written(folder: Path, text: str) -> Path:
    (folder / "run.yaml").write_text(text)
    return folder / "run.yaml"


def options(config: Path, *arguments: str, parser=build_parser):
    """The options of a command line, filled in."""
    args = parser().parse_args(["-c", str(config), *arguments])
    apply_config(args)
    return args


@pytest.mark.parametrize("K", [144, 64])
def test_a_preset_of_lightvlm_is_a_pruner_run_of_so_many_tokens(K):
    file = DOCS / f"lightvlm_k{K}.yaml"
    config = TrainConfig.of(read_yaml(file), str(file))
    assert (config.stage, config.pruner, config.keep_tokens) == ("pruner", "mlp", K)
    expected = {"model": f"lightvlm-k{K}", "pruner": "mlp", "keep_tokens": K}
    assert generate_options(file) == expected
    other = TrainConfig.of(read_yaml(DOCS / f"lightvlm_k{208 - K}.yaml"), "the other")
    changed = {"keep_tokens", "output"}
    assert {k for k, v in vars(config).items() if vars(other)[k] != v} == changed


def test_what_the_flags_leave_open_comes_from_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = written(tmp_path, PRUNER)
    (tmp_path / "trained-mlp").mkdir()
    for parser in (build_parser, build_chat_parser):
        args = options(file, parser=parser)
        assert (args.model, args.pruner, args.keep_tokens) == ("trained-mlp", "mlp", 49)
    args = options(file, "--model", "other", "--keep-ratio", "0.5", "--pruner", "norm")
    assert (args.model, args.pruner, args.keep_ratio, args.keep_tokens) == (
        "other", "norm", 0.5, None,
    )  # fmt: skip
    args = options(file, "--budget-ms", "100")
    assert (args.ms, args.keep_ratio, args.keep_tokens) == (100, None, None)


def test_of_adapters_the_base_and_their_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-adapters").mkdir()
    args = options(written(tmp_path, LORA))
    assert (args.model, args.adapter_path) == ("base", "my-adapters")
    assert args.pruner is None and args.chat_template_config == {"a": True}
    assert options(written(tmp_path, LORA), "--model", "other").adapter_path is None


def test_generate_asks_the_model_with_its_pruner(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(CHECKPOINT, "trained-mlp")
    compose(3).image().save("scene.png")
    question = ["--image", "scene.png", "--prompt", "Is there a star?", "--json", "a.json"]
    main(["-c", str(written(tmp_path, PRUNER)), *question])
    answer = json.loads((tmp_path / "a.json").read_text())
    assert (answer["pruner"], answer["visual_tokens_kept"]) == ("mlp", 49)


@pytest.mark.parametrize(
    ("text", "start"),
    [
        (PRUNER, "there is no trained-mlp, which "),
        (LORA, "there is no my-adapters, which "),
        ("stage: pruner\nprunner: mlp\n", "no.yaml: there is no key 'prunner'"),
        ("pruner: mlp\n", "no.yaml: stage is missing"),
        (None, "cannot read no.yaml"),
    ],
)
def test_a_file_that_trains_nothing_is_refused_in_one_sentence(
    text, start, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    if text:
        (tmp_path / "no.yaml").write_text(text)
    with pytest.raises(SystemExit) as stop:
        main(["-c", "no.yaml", "--prompt", "hi"])
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: {start}")
