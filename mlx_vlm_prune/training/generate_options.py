"""The options of `generate` and `chat` that a training file stands for: model, pruner, budget."""

import argparse
from pathlib import Path
from typing import Any

from ..checkpoints.errors import UserError
from .config import ADAPTER_STAGES, TrainConfig, read_yaml

BUDGETS = ("keep_ratio", "keep_tokens", "ms", "gb")


def generate_options(path: Path) -> dict[str, Any]:
    """The options of `generate` that a config file of `train` stands for. Raises UserError."""
    config = TrainConfig.of({"data": "", **read_yaml(path)}, str(path))
    has_adapters = config.stage in ADAPTER_STAGES
    options = {
        "model": config.model if has_adapters else config.output,
        "adapter_path": config.adapter_path if has_adapters else None,
        "pruner": None if config.pruner == "none" else config.pruner,
        "keep_ratio": config.keep_ratio,
        "keep_tokens": config.keep_tokens,
        "chat_template_config": config.chat_template_config or None,
    }
    return {name: value for name, value in options.items() if value is not None}


def apply_config(args: argparse.Namespace) -> None:
    """Fill in what the flags leave open from the file of `--config`. Raises UserError."""
    if args.config is None:
        return
    options, given = generate_options(args.config), vars(args)
    if any(given.get(name) is not None for name in BUDGETS):
        options = {name: value for name, value in options.items() if name not in BUDGETS}
    if args.model is not None and not args.adapter_path:
        options.pop("adapter_path", None)
    for name, value in options.items():
        if given.get(name) is None:
            setattr(args, name, value)
    trained = args.adapter_path or args.model
    if trained in options.values() and not Path(trained).exists():
        raise UserError(
            f"there is no {trained}, which {args.config} trains; train it first"
            f" (mlx-vlm-prune train -c {args.config}), or give model"
        )
