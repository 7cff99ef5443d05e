"""The built-in example world: seeded pictures, questions about them, and a model that knows them.

draw.py makes the picture, questions.py asks about it, vocabulary.py is all the
words there are, checkpoint/ is the model trained on them. numpy and Pillow
only: the trainer reads these files too, and it must not meet MLX.
"""

from pathlib import Path

from .draw import (
    CELLS,
    COLOURS,
    GRID,
    LARGE,
    LETTERS,
    SHAPES,
    SIZE,
    SMALL,
    Canvas,
    Scene,
    Sign,
    Thing,
    compose,
    draw,
)
from .questions import KINDS, Question, ask, question_set

CHECKPOINT = Path(__file__).parent / "checkpoint"
EVALUATION = Path(__file__).parent / "evaluation.json"  # of that model, see benchmarks/report.py
TRAIN_SEEDS = range(0, 1_000_000_000)
HELD_OUT_SEEDS = range(1_000_000_000, 2_000_000_000)  # judged on, never trained on

__all__ = [
    "CELLS",
    "CHECKPOINT",
    "COLOURS",
    "EVALUATION",
    "GRID",
    "HELD_OUT_SEEDS",
    "KINDS",
    "LARGE",
    "LETTERS",
    "SHAPES",
    "SIZE",
    "SMALL",
    "TRAIN_SEEDS",
    "Canvas",
    "Question",
    "Scene",
    "Sign",
    "Thing",
    "ask",
    "compose",
    "draw",
    "question_set",
]
