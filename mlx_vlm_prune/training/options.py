"""The command line of training: a flag for every key of the config file, in groups."""

import argparse
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from ..checkpoints.command_line import Parser, either
from .config import (
    DEFAULTS,
    FREEZABLE,
    OPTIMIZERS,
    REPORTERS,
    STAGES,
    TrainConfig,
    kind_of,
    read_yaml,
)

GROUPS: Mapping[str, Mapping[str, str]] = {
    "model and data": {
        "stage": "what learns: the projector (pretrain); projector, pruner and language model"
        " (sft); adapters (lora, dora); a learned pruner (pruner); a twig (twig)",
        "model": "folder or Hugging Face name (default: the built-in scenes model)",
        "tower": "folder of the vision tower, if --model is only MiniMind's language model; the"
        " projector then starts untrained",
        "tokenizer": "folder of that language model's tokenizer (default: beside it)",
        "dtype": "type of the weights and of the computation; auto is float32 for what learns. The"
        " rest is float32 on a CPU or from a float16 checkpoint, else in the checkpoint's type",
        "data": "a file of examples, or a folder with train and valid files",
        "format": "format of the data: jsonl, llava or minimind; auto looks at the file",
        "image_folder": "folder that image paths start from (default: the data file's folder)",
        "chat_template_config": 'the chat template\'s own options, such as {"open_thinking": true}',
        "max_seq_length": "most tokens of an example; longer ones are cut and counted",
        "skip_bad": "skip, list and count examples that cannot be used (default: stop)",
    },
    "what learns": {
        "freeze": "parts that do not learn although the stage trains them:"
        f" {either(FREEZABLE)}",
        "unfreeze": "parts that learn although the stage does not train them",
        "language_layers": "only this many of the language model's last layers learn",
        "pruner": "method that prunes during training: NAME, NAME:option=value,… or a chain;"
        " `pruners` lists them; as a flag it can be a FILE.py of your own",
        "keep_ratio": "share of an image's visual tokens to keep (default: half)",
        "keep_tokens": "number of visual tokens to keep, instead of --keep-ratio",
        "reset_pruner": "start a learned pruner from untrained weights (default: from the model's,"
        " if it has some)",
        "noise": "noise on a learned pruner's scores at the start; it falls to 0",
        "num_layers": "for lora and dora: number of the last layers that get adapters; -1 is all",
        "lora_parameters": "for lora and dora: rank, scale and dropout",
        "twig_layer": "for twig: the layer of the model whose output it reads",
        "twig_layers": "for twig: number of its layers",
    },
    "steps": {
        "iters": "number of steps (default: from --epochs)",
        "epochs": "passes over the data, instead of --iters",
        "batch_size": "examples per batch, in each process",
        "grad_accumulation_steps": "batches per step",
        "grad_checkpoint": "compute layers again in the backward pass: less memory, more time",
        "grad_clip": "largest norm of the gradient; larger ones are scaled down; 0 is no limit",
        "optimizer": either(OPTIMIZERS),
        "optimizer_config": "the optimizer's own settings, such as weight_decay",
        "learning_rate": "learning rate; as a flag it replaces the file's lr_schedule",
        "lr_schedule": "as in mlx-lm: name, arguments, warmup, warmup_init",
        "seed": "seed of the order of the examples and of dropout",
    },
    "reports and checkpoints": {
        "steps_per_report": "steps between two lines of metrics.jsonl",
        "steps_per_eval": "steps between two evaluations of the valid file",
        "val_batches": "batches of the valid file in each evaluation; -1 is all",
        "save_every": "steps between two checkpoints; the two newest are kept",
        "output": "folder of the trained model and its checkpoints",
        "adapter_path": "the same for lora and dora",
        "resume": "continue from the last checkpoint in that folder",
        "report_to": f"also send the figures to {either(REPORTERS)}",
        "project_name": "project of these reports (default: mlx_vlm_prune)",
    },
}  # fmt: skip
# Keys and values of their own.
FILE_ONLY = ("lora_parameters", "optimizer_config", "lr_schedule", "chat_template_config")
CHOICES = {"stage": STAGES, "optimizer": OPTIMIZERS, "freeze": FREEZABLE, "unfreeze": FREEZABLE}
# Of two keys that exclude each other, a flag takes the place of the other in the config file.
RIVALS = {
    "iters": "epochs", "epochs": "iters", "keep_ratio": "keep_tokens", "keep_tokens": "keep_ratio",
    "lr_schedule": "learning_rate",
}  # fmt: skip


def add_options(parser: Parser) -> None:
    """A flag for every key but those that hold keys and values."""
    parser.add_argument(
        "-c", "--config", type=Path, metavar="FILE",
        help="a YAML file with the keys below, and with "
        f"{', '.join(FILE_ONLY)}; docs/train.yaml of the repository explains all (default: none)",
    )  # fmt: skip
    by_name = {field.name: field for field in fields(TrainConfig)}
    for title, texts in GROUPS.items():
        group = parser.add_argument_group(title)
        for name, text in texts.items():
            if name not in FILE_ONLY:
                _add(group, by_name[name], text)


def _add(group: argparse._ArgumentGroup, field: Field[Any], text: str) -> None:
    """One flag. Its own default is None, so that it is known whether it was given."""
    kind, flag = kind_of(field.name), "--" + field.name.replace("_", "-")
    text = help_text(field, text)
    if kind is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        return
    options: dict[str, Any] = {"choices": CHOICES.get(field.name), "help": text}
    if kind is tuple:
        options["nargs"] = "*"
    else:
        options["type"] = kind
    if not options["choices"]:
        options["metavar"] = {int: "N", float: "X"}.get(kind, "TEXT")
    group.add_argument(flag, **options)


def help_text(field: "Field[Any]", text: str) -> str:
    """What a key means, and its default, where that is the stage's own for each stage."""
    text = text.replace("%", "%%")
    by_stage = {stage: values[field.name] for stage, values in DEFAULTS.items()
                if field.name in values}  # fmt: skip
    if by_stage:
        shown = ", ".join(f"{value:g} in {stage}" for stage, value in by_stage.items())
        others = len(by_stage) < len(STAGES)
        rest = f", else {1 if field.name == 'epochs' else field.default:g}" if others else ""
        return f"{text} (default: {shown}{rest})"
    unset = any(field.default is value for value in (MISSING, None, False, ()))
    return text if unset or "default" in text else f"{text} (default: {field.default})"


def config_of(args: argparse.Namespace) -> TrainConfig:
    """The config file's keys with the flags in their place. Raises UserError."""
    values = read_yaml(args.config) if args.config else {}
    names = [f.name for f in fields(TrainConfig)]
    flags = {name: v for name in names if (v := getattr(args, name, None)) is not None}
    values = {key: v for key, v in values.items() if RIVALS.get(key) not in flags}
    return TrainConfig.of({**values, **flags}, str(args.config or "the command line"))
