"""A tiny model and a few examples to train it on, for tests."""

import json
from pathlib import Path

import numpy as np

from mlx_vlm_prune.scenes import ask, compose

from . import tiny


def write_data(folder: Path, train: int = 6, valid: int = 3) -> Path:
    """A folder with train.jsonl, valid.jsonl and their pictures."""
    folder.mkdir()
    for split, count, first in (("train", train, 0), ("valid", valid, 100)):
        lines = []
        for n in range(first, first + count):
            scene = compose(n)
            scene.image().resize((64, 64)).save(folder / f"{n}.png")
            kind = ("existence", "counting")[n % 2]  # each scene has such questions
            question = ask(scene, kind, np.random.default_rng(n))
            assert question
            lines.append(
                {"image": f"{n}.png", "question": question.text, "answer": question.answer}
            )
        if lines:
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (folder / f"{split}.jsonl").write_text(text)
    return folder


def write_model(folder: Path) -> Path:
    """A checkpoint folder of ours with random weights."""
    folder.mkdir()
    return tiny.checkpoint(tiny.taught(tiny.reference()), folder)
