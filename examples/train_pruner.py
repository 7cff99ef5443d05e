"""Train a learned pruner on pictures of your own, and ask with it.

python examples/train_pruner.py
python examples/train_pruner.py 600

The number is that of training steps; eight show how it is done, 600 make a method of it. Needs
`pip install 'mlx-vlm-prune[train]'`. docs/training.md has all stages: adapters, projector, twig.
"""

import json
import sys
from pathlib import Path

import numpy as np

from mlx_vlm_prune import generate, load
from mlx_vlm_prune.scenes import HELD_OUT_SEEDS, TRAIN_SEEDS, question_set
from mlx_vlm_prune.train import main as train

QUESTIONS = 12  # of each of six kinds


def write_data(file: Path) -> None:
    """A line for every question: a picture's name, the question, the right answer."""
    file.parent.mkdir(exist_ok=True)
    lines = []
    for n, (scene, questions) in enumerate(question_set(TRAIN_SEEDS, QUESTIONS)):
        scene.image().save(file.parent / f"{n}.png")
        for each in questions:
            lines.append({"image": f"{n}.png", "question": each.text, "answer": each.answer})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def main(steps="8"):
    write_data(Path("pruner-data") / "train.jsonl")
    train(
        "--stage pruner --pruner score_prune --reset-pruner --keep-tokens 49 --batch-size 8"
        f" --iters {steps} --data pruner-data --output trained-pruner".split()
    )
    model, processor = load("trained-pruner")
    scene, questions = next(question_set(HELD_OUT_SEEDS, 1))
    for each in questions:
        answer = generate(
            model, processor, each.text, scene.image(), pruner="score_prune", keep_tokens=49
        )
        print(f"{each.text} {answer.text} (right: {each.answer})")


if __name__ == "__main__":
    np.random.seed(0)
    main(*sys.argv[1:])
