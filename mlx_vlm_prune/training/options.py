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
        "tower": "folder of the vision tower, where --model is MiniMind's language model alone: its"
        " projector then begins untrained",
        "tokenizer": "folder of that language model's tokenizer (default: beside it)",
        "dtype": "of the weights and the computation; auto is float32 for what learns, and on a"
        " CPU or for a float16 checkpoint for the rest, which is else in the checkpoint's own",
        "data": "a file of examples, or a folder with train and valid files",
        "format": "of the data: jsonl, llava or minimind; auto goes by how the file begins",
        "image_folder": "what images' paths are relative to (default: the data file's folder)",
        "chat_template_config": 'the chat template\'s own options, such as {"open_thinking": true}',
        "max_seq_length": "longer examples are cut to so many tokens, and counted",
        "skip_bad": "leave out examples that cannot be used, name and count them (default: stop)",
    },
    "what learns": {
        "freeze": "parts that stay as they are although the stage trains them:"
        f" {either(FREEZABLE)}",
        "unfreeze": "parts that learn although the stage would not train them",
        "language_layers": "only so many of the language model's last layers learn",
        "pruner": "NAME, NAME:option=value,… or a chain, in the loop while training; `pruners`"
        " lists them; as a flag, FILE.py is a method of your own",
        "keep_ratio": "share of an image's visual tokens to keep (default: half)",
        "keep_tokens": "number of them, in place of --keep-ratio",
        "reset_pruner": "begin a learned pruner with untrained weights (default: with the model's,"
        " where it has some)",
        "noise": "of a learned pruner's scores at first, falling to 0",
        "num_layers": "of lora and dora: how many of the last layers get adapters; -1 is all",
        "lora_parameters": "of lora and dora: rank, scale and dropout",
        "twig_layer": "of twig: layer of the base that it grows on",
        "twig_layers": "of twig: how many layers it has",
    },
    "steps": {
        "iters": "how many steps (default: what --epochs gives)",
        "epochs": "passes over the data, in place of --iters",
        "batch_size": "examples read together, by each process",
        "grad_accumulation_steps": "batches whose gradients make one step",
        "grad_checkpoint": "compute layers again in the backward pass: less memory, more time",
        "grad_clip": "the longest gradient; longer ones are shortened to it, 0 takes all",
        "optimizer": either(OPTIMIZERS),
        "optimizer_config": "the optimizer's own settings, such as weight_decay",
        "learning_rate": "of the optimizer; as a flag it takes the place of the file's lr_schedule",
        "lr_schedule": "mlx-lm's: name, arguments, warmup, warmup_init",
        "seed": "of the examples' order and of dropout",
    },
    "reports and checkpoints": {
        "steps_per_report": "steps between two lines of metrics.jsonl",
        "steps_per_eval": "steps between two evaluations of the valid file",
        "val_batches": "batches of valid examples in each; -1 is all",
        "save_every": "steps between two checkpoints; the two newest are kept",
        "output": "folder of the trained model and its checkpoints",
        "adapter_path": "the same of lora and dora",
        "resume": "go on from the last checkpoint in that folder",
        "report_to": f"{either(REPORTERS)} as well",
        "project_name": "of these reports (default: mlx_vlm_prune)",
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
        f"{', '.join(FILE_ONLY)}; docs/train.yaml explains all (default: none)",
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
