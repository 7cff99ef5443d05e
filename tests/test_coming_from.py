"""Promises of docs/coming-from.md: it has a row for all that six systems name, and its lines run.

Every command is parsed by the command that it names. Those of EfficientVLM and LightVLM run, on
tiny models under the names that stand there.
"""

import importlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionConfig

from benchmarks import scenes_data
from mlx_vlm_prune import Chat, load
from mlx_vlm_prune.__main__ import COMMANDS
from mlx_vlm_prune.checkpoints.command_line import Parser
from mlx_vlm_prune.evaluation.questions import format_of
from mlx_vlm_prune.scenes import compose
from mlx_vlm_prune.training.config import TrainConfig, read_yaml
from torch_ref.pruners.spec import parse_steps

from . import backbones, coming_from, llava, tiny
from .test_command_lines import Parsed, command

ROOT = Path(__file__).resolve().parents[1]
OTHERS = {"mlx_vlm.convert": "configure_parser"}  # of other packages
LINES = {" ".join(line): line for line in coming_from.commands()}


def module_of(line: list[str]) -> tuple[str, list[str]]:
    """The module that a command line runs, and its arguments."""
    if line[0] == "python":
        return line[2], line[3:]
    home = COMMANDS[line[1]]
    return f"mlx_vlm_prune.{home}" if home else "convert", line[2:]


def parsed(line: list[str], monkeypatch):
    """The arguments, by the parser of the command."""
    module, arguments = module_of(line)
    if module in OTHERS:
        parser = getattr(importlib.import_module(module), OTHERS[module])()
        return parser.parse_args(arguments)
    real, held = Parser.parse_args, []

    def parse_args(self, args=None, namespace=None):
        held.append(real(self, args, namespace))
        raise Parsed

    monkeypatch.setattr(Parser, "parse_args", parse_args)
    with pytest.raises(Parsed):
        command(module)(arguments)
    return held[0]


@pytest.mark.parametrize("title", coming_from.THEIRS)
def test_everything_that_a_system_names_has_a_row(title):
    theirs = " ".join(name for name, _ in coming_from.rows(coming_from.section(title)))
    theirs += coming_from.section(title).split("| theirs")[0]  # names and the sentences above
    missing = [name for name in coming_from.THEIRS[title].split() if name not in theirs]
    assert not missing


def test_no_row_is_empty_and_the_page_has_no_other_systems():
    headings = [line[3:] for line in coming_from.TEXT.splitlines() if line.startswith("## ")]
    assert headings == [*coming_from.THEIRS]
    pairs = coming_from.rows(coming_from.TEXT)
    assert len(pairs) > 120 and all(ours.strip() for _, ours in pairs)


@pytest.mark.parametrize("text", LINES)
def test_every_command_is_one_that_its_parser_takes(text, monkeypatch):
    monkeypatch.chdir(ROOT)
    args = vars(parsed(LINES[text], monkeypatch))
    for spec in args.get("pruner") or ():
        if len(spec) > 1:  # of several
            parse_steps(spec, 576, 144)
    if isinstance(args.get("pruner"), str):
        parse_steps(args["pruner"], 576, 144)
    if args.get("format") not in (None, "auto"):
        format_of(args["format"])
    if args.get("config"):
        TrainConfig.of(read_yaml(args["config"]), str(args["config"]))


def test_every_flag_in_the_right_columns_is_one_of_ours(monkeypatch):
    known = {"--nproc-per-node"}
    for module in {module_of(line)[0] for line in LINES.values()} - {*OTHERS}:
        parser = built(module, monkeypatch)
        known |= set(parser.flags.values()) | {"--resume", "--verbose"}
    for _, ours in coming_from.rows(coming_from.TEXT):
        for span in coming_from.spans(ours):
            if span.startswith("--"):
                assert span.split()[0] in known, span


def built(module: str, monkeypatch) -> Parser:
    """A command's parser."""
    held = []

    def parse_args(self, *arguments):
        held.append(self)
        raise Parsed

    with monkeypatch.context() as patch:
        patch.setattr(Parser, "parse_args", parse_args)
        with pytest.raises(Parsed):
            command(module)(["x"])
    return held[0]


# --- lines that run -------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a line in the test's folder, as a user does who types nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLX_VLM_PRUNE_CALIBRATION_SECONDS", "0.1")  # as short as can be
    with open(os.devnull) as nothing:
        monkeypatch.setattr("sys.stdin", nothing)

        def run(line: list[str]) -> None:
            module, arguments = module_of(line)
            code, short = 0, {"mlx_vlm_prune.generate": ["--max-tokens", "2"]}
            try:
                command(module)([*arguments, *short.get(module, [])])
            except SystemExit as stop:
                code = stop.code or 0
            assert code == 0, (line, capsys.readouterr().err)

        yield run


def test_the_lines_of_efficientvlm_run(tmp_path, run):
    """From a language model alone through both stages to answers, a sweep and a plot."""
    model = tiny.reference()
    pth, clip = tiny.publish(model, tmp_path)
    hub = tmp_path / "jingyaogong"
    (hub / "MiniMind2-V-PyTorch").mkdir(parents=True)
    shutil.copy(pth, hub / "MiniMind2-V-PyTorch" / "sft_vlm_512.pth")
    pth.rename(tmp_path / "sft_vlm_512.pth")
    state = torch.load(tmp_path / "sft_vlm_512.pth")
    language = {name: value for name, value in state.items() if "vision" not in name}
    torch.save(language, tmp_path / "llm_512.pth")
    shutil.copytree(clip, tmp_path / "openai" / "clip-vit-base-patch16")
    clip.rename(tmp_path / "clip-vit-base-patch16")
    for words in (hub / "MiniMind2-V", tmp_path / "minimind2"):
        tiny.write_words(words)
    for name in ("pretrain_i2t", "sft_i2t"):
        drawn = [
            scenes_data.example(seed, scenes_data.Asking(["existence"], 1)) for seed in range(4)
        ]
        scenes_data.write_minimind(iter(filter(None, drawn)), tmp_path, name)
    compose(0).image().save(tmp_path / "photo.jpg")
    question = {"image": "photo.jpg", "question": "Is there a star?", "answer": "yes"}
    (tmp_path / "questions.jsonl").write_text(json.dumps(question) + "\n")
    lines = coming_from.commands(coming_from.section("EfficientVLM"))
    assert len(lines) > 7
    for line in lines:
        if "benchmarks.efficientvlm" not in line:
            run(line)


def test_the_lines_of_lightvlm_run(tmp_path, run):
    """A tiny LLaVA of Phi, its tower's 576 patches as many as LightVLM's."""
    folder, side = tmp_path / "my-llava-phi2-hf", 336
    text, _, more = backbones.KINDS["phi"]
    tower = CLIPVisionConfig(**llava.TOWER | {"image_size": side, "patch_size": 14})
    llava.KINDS["phi of 576"] = (text, tower, more)
    try:
        llava.write(llava.random_model("phi of 576"), folder)
    finally:
        del llava.KINDS["phi of 576"]
    sizes = {"size": {"shortest_edge": side}, "crop_size": side}
    (folder / "preprocessor_config.json").write_text(json.dumps(sizes))
    (tmp_path / "train2017").mkdir()
    (tmp_path / "docs").mkdir()
    for name in ("lightvlm_k144.yaml", "lightvlm_k64.yaml"):
        shutil.copy(ROOT / "docs" / name, tmp_path / "docs")
    compose(0).image().save(tmp_path / "photo.jpg")
    shutil.copy(tmp_path / "photo.jpg", tmp_path / "train2017" / "1.jpg")
    turns = [
        {"from": "human", "value": "<image>\nis there a star"},
        {"from": "gpt", "value": "yes"},
    ]
    record = {"id": "1", "image": "1.jpg", "conversations": turns}
    (tmp_path / "llava_instruct_150k.json").write_text(json.dumps([record] * 2))
    question = {"image": "photo.jpg", "question": "Is there a star?", "answer": "yes"}
    (tmp_path / "questions.jsonl").write_text(json.dumps(question) + "\n")
    lines = coming_from.commands(coming_from.section("LightVLM"))
    trained = next(line for line in lines if "train" in line and "-c" in line)
    smaller = [part.replace("k144", "k64") for part in trained]
    for line in [*lines[:2], trained, smaller, *lines[2:]]:
        if line != trained or not (tmp_path / "lightvlm-k144").exists():
            run(line)
    model, processor = load(tmp_path / "lightvlm-k144")
    chat = Chat(model, processor, pruner="mlp", keep_tokens=144, max_tokens=3)
    answer = chat.ask("What is in this image?", tmp_path / "photo.jpg")
    assert (answer.visual_tokens_kept, answer.visual_tokens) == (144, 576)
