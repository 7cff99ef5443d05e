"""Train a model, a pruner, adapters or a twig on your own pictures.

python -m mlx_vlm_prune.train --stage sft --data train.jsonl --output trained
python -m mlx_vlm_prune.train -c config.yaml --learning-rate 1e-5
"""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from .checkpoints.command_line import Parser, in_one_sentence
from .training.config import STAGES, TrainConfig, read_yaml

DESCRIPTION = "Train on your own pictures. Flags override the keys of the config file."


# fmt: off
def build_parser() -> Parser:
    """The command line of `train`."""
    parser = Parser("mlx_vlm_prune.train", description=DESCRIPTION)
    add = parser.add_argument
    add("-c", "--config", type=Path, metavar="FILE",
        help="a YAML file with the keys below (default: none)")
    add("--stage", choices=STAGES, help="what learns")
    add("--data", metavar="PATH", help="a file, or a folder with train and valid files")
    add("--model", help="folder or Hugging Face name (default: the built-in scenes model)")
    for name, kind, text in OPTIONS:
        add("--" + name.replace("_", "-"), type=kind, metavar=kind.__name__.upper(), help=text)
    add("--freeze", nargs="*", help="parts that do not learn: tower, projector, language, pruner")
    for name, text in SWITCHES:
        add("--" + name.replace("_", "-"), action="store_true", default=None, help=text)
    return parser
# fmt: on

OPTIONS: list[tuple[str, type, str]] = [
    ("dtype", str, "of the weights and the computation"),
    ("pruner", str, "NAME, NAME:option=value,… or a chain; `pruners` lists them"),
    ("keep_ratio", float, "share of the visual tokens to keep"),
    ("keep_tokens", int, "number of visual tokens to keep"),
    ("num_layers", int, "how many of the last layers get adapters; -1 is all"),
    ("twig_layer", int, "layer of the base that the twig grows on"),
    ("twig_layers", int, "layers of the twig"),
    ("format", str, "of the data"),
    ("image_folder", str, "what images' paths are relative to"),
    ("max_seq_length", int, "longer examples are cut to so many tokens"),
    ("iters", int, "steps"),
    ("epochs", float, "passes over the data, in place of --iters"),
    ("batch_size", int, "examples read together"),
    ("grad_accumulation_steps", int, "batches in a step"),
    ("grad_clip", float, "longest gradient; 0 for any"),
    ("optimizer", str, "adam, adamw, muon, sgd or adafactor"),
    ("learning_rate", float, "of the optimizer"),
    ("seed", int, "of the order of examples and of dropout"),
    ("steps_per_report", int, "steps between two reports"),
    ("steps_per_eval", int, "steps between two evaluations of held-out examples"),
    ("val_batches", int, "batches of an evaluation; -1 is all"),
    ("save_every", int, "steps between two checkpoints"),
    ("output", str, "folder of the trained model"),
    ("adapter_path", str, "folder of the adapters"),
    ("report_to", str, "wandb or swanlab"),
    ("project_name", str, "of the reports"),
]
SWITCHES = [
    ("train_projector", "the projector learns beside the adapters"),
    ("skip_bad", "leave out examples that cannot be used, and count them"),
    ("grad_checkpoint", "use less memory and more time"),
    ("resume", "go on from the last checkpoint"),
]


def config_of(args: Any) -> TrainConfig:
    """The config file's keys with the flags in their place."""
    values = read_yaml(args.config) if args.config else {}
    names = [f.name for f in fields(TrainConfig)]
    flags = {name: v for name in names if (v := getattr(args, name, None)) is not None}
    return TrainConfig.of({**values, **flags}, str(args.config or "the command line"))


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; a user's mistake ends in one sentence and exit code 2."""
    parser = build_parser()
    with in_one_sentence(parser):
        args = parser.parse_args(argv)
        config = config_of(args)
        from .training.run import train  # imports mlx

        train(config)


if __name__ == "__main__":
    main()
