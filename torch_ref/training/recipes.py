"""Every number of the training. Imports no torch, so that its command can tell of them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ScenesRecipe:
    """The scenes model, from nothing."""

    tower_steps: int = 1500  # the first stage
    steps: int = 7000  # both stages
    decay: float = 0.25  # the last share of the steps, in which the rate falls to zero
    warmup: int = 100
    batch: int = 32  # pictures
    question_tokens: int = 224  # per picture
    muon_rate: float = 2e-3  # matrices
    adam_rate: float = 1.5e-3  # all else
    weight_decay: float = 0.01
    dense_weight: float = 0.5  # of the patch loss in the second stage
    seed: int = 1
