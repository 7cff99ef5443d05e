"""Runs of few steps of a stage, and their data."""

import json
from pathlib import Path
from typing import Any

from mlx_vlm_prune.scenes import compose
from mlx_vlm_prune.training.config import TrainConfig
from tests import training_data

QUESTION = "What does the sign say?"


def write(folder: Path, count: int = 4) -> Path:
    """FOLDER/train.jsonl, its pictures beside it."""
    lines = []
    for i in range(count):
        compose(i).image().save(folder / f"{i}.png")
        line = {"image": f"{i}.png", "question": QUESTION, "answer": ["grey", "red"][i % 2]}
        lines.append(json.dumps(line))
    (folder / "train.jsonl").write_text("\n".join(lines))
    return folder / "train.jsonl"


def config(stage: str, model: Path | None, data: Path, out: Path, **keys: Any) -> TrainConfig:
    """Three steps into OUT."""
    return training_data.config(stage, data, out, model=model and str(model), **keys)
